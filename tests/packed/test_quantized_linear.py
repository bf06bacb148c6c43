"""Layers over packed weights: products equal those with the dequantised matrix, for all forms, ways, shapes and types."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.errors import CheckpointError, RecipeError
from weft.packed import (
    Activations,
    Affine,
    Binary,
    Lookup,
    LowRank,
    Minifloat,
    Packed,
    QuantizedEmbedding,
    QuantizedLinear,
    Transposed,
    Vectors,
    quantize_inputs,
    replace_,
    using_backend,
)
from weft.packed import product as products
from weft.packed.linear import _constant
from weft.packed.rows import dequantize, some_rows

# Of the norm of the result. float32: sums of about a thousand terms in another order. bfloat16 (unit roundoff 2⁻⁹): the
# rounding of inputs, weights and result; the int4 operator rounds scale and zero of a weight instead, which for codes
# far from the middle is up to four times that.
FLOAT32, BFLOAT16 = 2e-6, 2**-6


def affine(
    out: int, columns: int, groups: int = 1, bits: int = 4, kind: str = "asymmetric", seed: int = 0, size: float = 1.0
) -> Affine:
    draw = torch.Generator().manual_seed(seed)
    low = -(1 << (bits - 1)) if kind == "symmetric" else 0
    codes = torch.randint(low, low + (1 << bits), (out, columns), generator=draw).to(torch.int16)
    scale = (torch.rand(out, groups, generator=draw) + 0.1) * size
    if kind == "symmetric":
        zero = torch.zeros(out, groups)
    else:
        zero = torch.randint(0, 1 << bits, (out, groups), generator=draw).float()
        if kind == "real":
            zero = zero + torch.rand(out, groups, generator=draw)
    return Affine(codes, scale, zero, bits, low)


def forms(out: int, columns: int) -> dict[str, Packed]:
    """One of each form, of odd sizes too."""
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=draw)

    tall, wide = -(-out // 8), -(-columns // 16)
    blocks = -(-out * columns // 24)
    grid = affine(out, columns)
    lookup = Lookup(integers(16, out, columns).to(torch.uint8), random(1, 16), random(blocks).abs(), 24)
    return {
        "affine": grid,
        "affine 3 bits, real zeros": affine(out, columns, bits=3, kind="real"),
        "affine 8 bits, symmetric": affine(out, columns, bits=8, kind="symmetric"),
        "affine 8 bits": affine(out, columns, bits=8),
        "minifloat e4m3": Minifloat(integers(120, out, columns).to(torch.uint8), random(tall, wide).abs(), "e4m3", (8, 16)),
        "minifloat e2m1": Minifloat(
            integers(16, out, columns).to(torch.uint8), random(out, wide).abs(), "e2m1", (1, 16), torch.tensor(0.5)
        ),
        "lookup, uneven blocks": lookup,
        "lookup, tables": Lookup(
            integers(8, out, columns).to(torch.uint8), random(3, 8), random(out).abs(), columns, table=integers(3, out).to(torch.uint8)
        ),
        "lookup, nested": Lookup(
            integers(16, out, columns).to(torch.uint8), random(1, 16), integers(256, out).to(torch.uint8), columns,
            random(-(-out // 256)).abs(), torch.tensor(0.3),
        ),
        "vectors": Vectors(
            integers(8, 2, out, -(-columns // 4)).to(torch.int32), (random(1, 8, 4), random(1, 8, 4)), columns,
            None, random(out), random(out),
        ),
        "binary": Binary(integers(2, 2, out, columns).bool(), random(2, tall, wide).abs(), (8, 16)),
        "transposed": Transposed(affine(columns, out)),
        "low-rank": LowRank(grid, random(out, 2), random(2, columns)),
        "int8 inputs": Activations(affine(out, columns, bits=8, kind="symmetric"), "int8"),
        "int8 inputs, asymmetric, static": Activations(affine(out, columns), "int8", torch.tensor(0.02)),
        "e4m3 inputs": Activations(lookup, "e4m3"),
        "low-rank of int8 inputs": LowRank(Activations(grid, "int8"), random(out, 2), random(2, columns)),
    }  # fmt: skip


SHAPES = [(33, 40), (1, 1), (40, 33), (16, 256)]
FORMS = list(forms(1, 1))


def expected(packed: Packed, x: Tensor) -> Tensor:
    """x times the matrix in float64, with inputs that are quantised where they are."""
    if isinstance(packed, LowRank):
        return expected(packed.inner, x) + x.double() @ packed.right.double().T @ packed.left.double().T
    if isinstance(packed, Activations):
        return quantize_inputs(x.float(), packed.kind, packed.input_scale).double() @ packed.dequantize().double().T
    return x.double() @ packed.dequantize().double().T


def relative(made: Tensor, wanted: Tensor) -> float:
    return float((made.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_gradients_are_those_of_the_dequantised_matrix(form: str, shape: tuple[int, int]) -> None:
    packed = forms(*shape)[form]
    bias = torch.randn(shape[0])
    layer = QuantizedLinear.from_packed(packed, bias)
    for dtype, bound in ((torch.float32, FLOAT32), (torch.float16, 2**-10), (torch.bfloat16, BFLOAT16)):
        for batch in ((), (3,), (2, 3), (70,)):
            x = torch.randn(*batch, shape[1]).to(dtype).requires_grad_()
            wanted = expected(packed, x.detach().reshape(-1, shape[1])).reshape(*batch, -1)
            made = layer(x)
            assert made.dtype == dtype
            assert made.shape == (*batch, shape[0])
            assert relative(made, wanted + bias.double()) < bound + (wanted.norm() / (wanted + bias).norm()) * bound
            gradient = torch.randn_like(made)
            made.backward(gradient)
            back = gradient.double() @ packed.dequantize().double()
            assert x.grad is not None
            assert x.grad.dtype == dtype
            assert relative(x.grad, back) < bound


@pytest.mark.parametrize(
    ("way", "packed"),
    [
        ("int4", affine(33, 256, 2)),
        ("int4", affine(50, 96, 3, bits=3, kind="real")),
        ("int4", affine(16, 1000, bits=2)),
        ("int4", affine(64, 512, 4, kind="symmetric")),
        ("int4", affine(1, 1)),
        ("int4", LowRank(affine(20, 64), torch.randn(20, 3), torch.randn(3, 64))),
        ("int8", affine(33, 40, bits=8, kind="symmetric")),
        ("int8", affine(7, 33, bits=5)),
        ("int8", affine(1, 1, bits=8, kind="symmetric")),
        ("integer", Activations(affine(33, 40, bits=8), "int8")),
        ("integer", Activations(affine(33, 33, bits=8, kind="symmetric"), "int8", torch.tensor(0.01))),
        ("integer", Activations(affine(17, 64), "int8")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{type(value).__name__}{value.shape}",
)
@pytest.mark.parametrize("batch", [1, 3, 9, 80])
def test_each_way_is_the_reference(way: str, packed: Packed, batch: int) -> None:
    x = torch.randn(batch, packed.shape[1]).to(torch.bfloat16)
    layer = QuantizedLinear.from_packed(packed, backend=way)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a way that is refused warns
        made = layer(x)
    assert len(layer._ready) >= 2
    assert relative(made, expected(packed, x)) < BFLOAT16
    if way == "integer":  # exact but for the scales, whatever the batch
        assert relative(layer(x.float()), expected(packed, x)) < FLOAT32
    with using_backend(layer, "dequantize"):
        assert relative(layer(x), expected(packed, x)) < BFLOAT16
        assert not layer._ready
    assert layer.backend == way


def test_integers_are_multiplied_exactly() -> None:
    packed = affine(9, 100, bits=8)
    exact = Affine(packed.codes, torch.full((9, 1), 0.5), packed.zero, 8, 0)
    layer = QuantizedLinear.from_packed(Activations(exact, "int8", torch.tensor(0.25)))
    x = torch.randint(-128, 128, (20, 100)) * 0.25
    assert torch.equal(layer(x), (x.double() @ exact.dequantize().double().T).float())


def test_the_way_is_chosen_by_type_and_batch() -> None:
    layer = QuantizedLinear.from_packed(affine(32, 64))
    layer(torch.randn(2, 64))
    layer(torch.randn(products.LARGEST["int4"] + 1, 64).to(torch.bfloat16))
    assert not layer._ready  # exact in float32; large batches unpack
    layer(torch.randn(2, 64).to(torch.bfloat16))
    assert layer._ready
    layer.release()
    assert not layer._ready
    narrow = QuantizedLinear.from_packed(affine(32, 64), dtype=torch.bfloat16)
    assert narrow(torch.randn(2, 64)).dtype == torch.float32
    assert narrow._ready
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16
    assert layer._ready


def test_a_way_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_WARNED", set())
    monkeypatch.setattr(products.torch_int4, "multiply", lambda x, ready, rows: torch.zeros(len(x), rows))
    packed = affine(32, 64)
    layers = [QuantizedLinear.from_packed(packed) for _ in range(2)]
    x = torch.randn(2, 64).to(torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="'int4' are wrong"):
        made = layers[0](x)
    assert relative(made, expected(packed, x)) < BFLOAT16
    assert relative(layers[1](x), expected(packed, x)) < BFLOAT16  # without a second warning, which would be an error


def test_large_matrices_are_multiplied_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", 5 * 40)
    for name, packed in forms(33, 40).items():
        x = torch.randn(4, 40, requires_grad=True)
        y = QuantizedLinear.from_packed(packed, backend="dequantize")(x)
        assert relative(y, expected(packed, x.detach())) < FLOAT32, name
        y.sum().backward()
        assert x.grad is not None
        assert relative(x.grad, torch.ones(4, 33).double() @ packed.dequantize().double()) < FLOAT32, name


def test_the_copy_of_the_codes_is_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    several = {
        "int4": affine(600, 96, 3, kind="real"), "int8": affine(600, 33, bits=8, kind="symmetric"),
        "integer": Activations(affine(600, 33, bits=8), "int8"),
    }  # fmt: skip
    for way, packed in several.items():
        tensors, settings = packed.tensors(), packed.settings()
        monkeypatch.setattr(products, "REPACKED", 1 << 24)
        whole = products.prepare(way, tensors, settings, packed.shape)
        monkeypatch.setattr(products, "REPACKED", 1)
        for one, other in zip(whole, products.prepare(way, tensors, settings, packed.shape), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_some_rows_are_those_of_the_matrix(form: str) -> None:
    packed = forms(33, 48)[form]
    tensors, settings = packed.tensors(), packed.settings()
    whole = packed.dequantize()
    assert torch.equal(dequantize(tensors, settings), whole)
    for rows in (slice(3, 17), torch.tensor([32, 0, 5, 5])):
        assert torch.equal(dequantize(tensors, settings, rows), whole[rows])
    assert (some_rows(tensors, settings, slice(0, 1)) is None) == (form == "transposed")


@pytest.mark.parametrize("form", FORMS)
def test_the_state_dict_is_what_a_file_holds(form: str) -> None:
    from safetensors.torch import load, save

    packed = forms(33, 40)[form]
    layer = QuantizedLinear.from_packed(packed, torch.randn(33))
    x = torch.randn(3, 40)
    state = layer.state_dict()
    assert {n for n in state if n not in ("bias", "_extra_state")} == packed.tensors().keys()
    for kept in (load(save({n: t.clone() for n, t in state.items()})), {**state}):
        again = QuantizedLinear.from_state_dict({f"a.{n}": t for n, t in kept.items()}, "a.")
        assert torch.equal(again(x), layer(x))
        assert torch.equal(again.packed().dequantize(), packed.dequantize())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    layer.load_state_dict(torch.load(file, weights_only=True))


def test_loading_into_a_layer() -> None:
    one, two = (QuantizedLinear.from_packed(affine(32, 64, seed=s)) for s in (1, 2))
    x = torch.randn(2, 64).to(torch.bfloat16)
    two(x)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(x), one(x))  # not by the old copy of the codes
    other = QuantizedLinear.from_packed(affine(32, 64, bits=8)).state_dict()
    other["codes"] = one.codes
    with pytest.raises(CheckpointError, match="make a new layer"):
        two.load_state_dict(other)
    with pytest.raises(CheckpointError, match=r"no packed weight at 'b\.'"):
        QuantizedLinear.from_state_dict(one.state_dict(), "b.")
    state = one.state_dict()
    del state["scale"]
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        QuantizedLinear.from_state_dict(state)
    state = {**one.state_dict(), "_extra_state": torch.tensor([1, 2], dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="cannot be read"):
        QuantizedLinear.from_state_dict(state)


def test_copies_moves_and_conversions_leave_the_packed_weight_alone() -> None:
    packed = affine(32, 64)
    layer = nn.Sequential(QuantizedLinear.from_packed(packed, torch.randn(32), backend="int4"))
    x = torch.randn(3, 64)
    before = layer(x)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not made[0]._ready
        assert torch.equal(made(x), before)
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)):
        made = change(copy.deepcopy(layer))
        assert all(torch.equal(t, made[0].tensors()[n]) for n, t in layer[0].tensors().items())
        assert made[0].scale.dtype == torch.float32
        assert made[0].bias.dtype != torch.float32
        made(x)
    meta = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in meta[0].tensors().values())
    assert meta(torch.empty(3, 64, device="meta")).shape == (3, 32)
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), before)


def test_special_inputs() -> None:
    for backend in ("dequantize", "int4", "int8", "integer"):
        bits, kind = (4, "asymmetric") if backend == "int4" else (8, "symmetric")
        inner = affine(32, 64, bits=bits, kind=kind)
        for static in (None, torch.tensor(0.1)) if backend == "integer" else (None,):
            packed = Activations(inner, "int8", static) if backend == "integer" else inner
            layer = QuantizedLinear.from_packed(packed, backend=backend)
            assert layer(torch.zeros(0, 64)).shape == (0, 32)
            assert layer(torch.zeros(2, 0, 64)).shape == (2, 0, 32)
            assert not layer(torch.zeros(1, 64)).any()
            x = torch.randn(3, 64)
            x[1, 5] = torch.nan
            assert layer(x).isnan().all(1).tolist() == [False, True, False]
            x[1, 5] = torch.inf
            made = layer(x)
            assert made[[0, 2]].isfinite().all()
            assert made[1].isfinite().all() == (static is not None)  # clamped to the largest code
            assert layer(torch.randn(64, 3).T).shape == (3, 32)
            with pytest.raises(RecipeError, match="64 columns"):
                layer(torch.randn(2, 63))
            with pytest.raises(RecipeError, match="floating-point type"):
                layer(torch.ones(2, 64, dtype=torch.int32))
    empty = torch.zeros(0, 64, requires_grad=True)
    QuantizedLinear.from_packed(affine(32, 64))(empty).sum().backward()
    assert empty.grad is not None


def test_what_cannot_be_is_said() -> None:
    packed = affine(32, 64)
    with pytest.raises(RecipeError, match=r"Did you mean .*int4"):
        QuantizedLinear.from_packed(packed, backend="int5")
    with pytest.raises(RecipeError, match="no products by the way 'int8'"):
        QuantizedLinear.from_packed(packed, backend="int8")
    with pytest.raises(RecipeError, match="bias of 32"):
        QuantizedLinear.from_packed(packed, torch.zeros(3))
    with pytest.raises(RecipeError, match="floating-point"):
        QuantizedLinear.from_packed(packed, dtype=torch.int8)
    with pytest.raises(RecipeError, match="do not stand for themselves"):
        QuantizedEmbedding.from_packed(Transposed(packed))
    layer = QuantizedLinear.from_packed(packed, backend="int4", transposed=True, dtype=torch.bfloat16)
    assert "backend=int4" in repr(layer)
    assert layer.weight.shape == (64, 32)
    assert layer.weight.dtype == torch.bfloat16
    assert json.loads(bytes(layer.get_extra_state().tolist()))["settings"] == packed.settings()


@pytest.mark.parametrize("form", [f for f in FORMS if f != "transposed" and "inputs" not in f])
def test_embeddings_look_up_rows(form: str) -> None:
    packed = forms(33, 48)[form]
    table = QuantizedEmbedding.from_packed(packed, padding_idx=0)
    tokens = torch.tensor([[0, 32], [7, 7]])
    assert torch.equal(table(tokens), packed.dequantize()[tokens])
    assert table(tokens.int()).shape == (2, 2, 48)
    assert table(torch.zeros(0, dtype=torch.long)).shape == (0, 48)
    with pytest.raises(IndexError, match="0 to 32"):
        table(torch.tensor([33]))
    half = copy.deepcopy(table).to(torch.bfloat16)
    assert half(tokens).dtype == half.weight.dtype == torch.bfloat16
    again = QuantizedEmbedding.from_state_dict(table.state_dict())
    assert torch.equal(again(tokens), table(tokens))


def test_the_mark_of_constants_is_what_torch_makes() -> None:
    def plain() -> None: ...

    assert vars(torch.compiler.assume_constant_result(plain)) == vars(_constant(lambda: None))
    code = "import sys, weft.quantize, weft.packed.linear; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_layers_compile_whole() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = QuantizedEmbedding.from_packed(affine(20, 64))
            self.first = QuantizedLinear.from_packed(affine(32, 64), torch.randn(32))
            self.second = QuantizedLinear.from_packed(Activations(affine(8, 32, bits=8), "int8"))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.second(self.first(self.table(tokens)).relu())

    net = Net().to(torch.bfloat16)
    compiled: Any = torch.compile(copy.deepcopy(net), fullgraph=True, backend="eager")
    for count in (3, 5, 100):
        tokens = torch.arange(count) % 20
        assert torch.equal(compiled(tokens), net(tokens))
    assert compiled._orig_mod.first._ready
    assert compiled._orig_mod.second._ready
    exported = torch.export.export(copy.deepcopy(net), (torch.arange(3),)).module()  # which unpacks: it sees no values
    assert relative(exported(torch.arange(3)), net(torch.arange(3)).double()) < 4 * BFLOAT16  # two layers, two ways
    x = torch.randn(3, 64, requires_grad=True)
    layer: Any = torch.compile(net.first, fullgraph=True, backend="aot_eager")
    layer(x).sum().backward()
    assert x.grad is not None
    assert relative(x.grad, torch.ones(3, 32).double() @ net.first.packed().dequantize().double()) < FLOAT32


def test_operators_are_well_formed() -> None:
    layer = QuantizedLinear.from_packed(affine(32, 64), backend="int4")
    layer(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    arguments = (x, list(layer.tensors().values()), layer._ready, layer._chosen()[1])
    torch.library.opcheck(products.packed_linear, arguments)
    rows = (torch.tensor([1, 2]), list(layer.tensors().values()), torch.float32, layer._chosen()[1])
    torch.library.opcheck(products.packed_rows, rows)


def test_replacing_layers_of_a_model() -> None:
    model = nn.Sequential(nn.Embedding(20, 64, padding_idx=1), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 20)).eval()
    table, first = affine(20, 64, 2), affine(32, 64)
    bias = model[1].bias
    with pytest.raises(RecipeError, match=r"no layer '4\.weight' .* Known: 0, 1, 3"):
        replace_(model, {"1": first, "4.weight": first})
    with pytest.raises(RecipeError, match=r"\[20, 32\] \(out, in\)"):
        replace_(model, {"1": first, "3": first})
    assert type(model[1]) is nn.Linear  # nothing was replaced
    assert replace_(model, {"0.weight": table, "1": first}) is model
    assert isinstance(model[0], QuantizedEmbedding)
    assert model[0].padding_idx == 1
    assert model[1].bias is bias
    assert not model[1].training
    assert isinstance(replace_(nn.Linear(64, 32), {"weight": first}), QuantizedLinear)

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(RecipeError, match="forward pass of its own"):
        replace_(nn.Sequential(Own(64, 32)), {"0": first})


def test_ties_end_only_where_all_of_them_are_given() -> None:
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 20))
    model[1].weight = model[0].weight
    packed = affine(20, 64)
    with pytest.raises(RecipeError, match=r"1 is tied to 0\.weight"):
        replace_(model, {"1": packed})
    replace_(model, {"1": packed, "0": packed})
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, shared)
    replace_(model, {"1": affine(64, 64)})
    assert model[0] is model[1]


def quantized_model(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model with packed linear layers and experts, and one with the same values, dense."""
    from weft.calibrate.experts import unfused
    from weft.function.layout import is_conv1d

    dense = copy.deepcopy(model)
    packed: dict[str, Affine] = {}

    def quantized(name: str, shape: torch.Size) -> Tensor:
        packed[name] = affine(*shape, shape[1] // 16, seed=len(packed), size=0.01)
        return packed[name].dequantize()

    with torch.no_grad():
        for name, module in dense.named_modules():
            if is_conv1d(type(module)):
                module.weight.copy_(quantized(name, module.weight.T.shape).T)
            elif isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(quantized(name, module.weight.shape))
        with unfused(dense) as layers:
            for name, layer in layers.items():
                layer.weight.copy_(quantized(name, layer.weight.shape))
    return replace_(copy.deepcopy(model), packed), dense


def tiny(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**common, num_local_experts=4)).eval()
    if kind == "qwen3-moe":
        config = transformers.Qwen3MoeConfig(
            **common, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8
        )
        return transformers.Qwen3MoeForCausalLM(config).eval()
    if kind == "gpt-oss":
        config = transformers.GptOssConfig(
            **common, num_local_experts=4, num_experts_per_tok=2, head_dim=8, layer_types=["full_attention"] * 2,
            pad_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return transformers.GptOssForCausalLM(config).eval()
    config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=32, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "gpt-oss", "gpt2"])
def test_models_of_transformers_compute_what_dense_ones_do(kind: str) -> None:
    torch.manual_seed(0)
    model, dense = quantized_model(tiny(kind))
    if hasattr(dense.config, "_experts_implementation"):
        dense.set_experts_implementation("eager")
    tokens = torch.randint(32, (2, 9))
    with torch.no_grad():
        wanted, made = dense(tokens).logits, model(tokens).logits
        assert relative(made, wanted.double()) < 1e-6
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(tokens).logits, made)
        state = model.state_dict()
        assert not any(n.endswith(("_proj", "c_attn.weight")) for n in state)
        again.load_state_dict(state)


def test_experts_are_replaced_together() -> None:
    model = tiny("mixtral")
    one = {"model.layers.0.mlp.experts.1.down_proj": affine(32, 48)}
    with pytest.raises(RecipeError, match=r"give all of them, \[0, 2, 3\]"):
        replace_(model, one)
    whole = {f"model.layers.0.mlp.experts.{i}.down_proj": affine(32, 48, seed=i) for i in range(4)}
    experts = replace_(model, whole).model.layers[0].mlp.experts
    assert experts.config is not model.config
    assert model.config._experts_implementation != "eager"  # of other experts
    matrices = experts.down_proj
    dense = torch.stack([p.dequantize() for p in whole.values()])
    assert matrices.shape == dense.shape
    assert torch.equal(matrices[torch.tensor(2)].dense(), dense[2])
    assert torch.equal(matrices[-1] * 1, dense[3])
    index = torch.tensor([[3, 1]])
    assert torch.equal(matrices[index], dense[index])
    assert torch.equal(matrices[1:3], dense[1:3])
    assert torch.equal(torch.stack([m.dense() for m in matrices]), dense)
    with pytest.raises(IndexError):
        matrices[4]
    x = torch.randn(5, 32)
    torch.testing.assert_close(x @ matrices[0], x @ dense[0])
    torch.testing.assert_close(torch.randn(2, 48) @ matrices[0].T * 0, torch.zeros(2, 32))
    assert matrices.to(torch.bfloat16)[0].dense().dtype == torch.bfloat16
