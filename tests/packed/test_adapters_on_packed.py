"""Adapters on layers over packed weights: the weight stays packed, and what they compute is what they do on dense ones."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.adapt import EVA, Bone, LoRA, load_adapter_, merge_, remove_, save_adapter, switched, unmerge_
from weft.errors import RecipeError
from weft.normalize import WeightStandardization
from weft.packed import Affine, QuantizedExperts, QuantizedLinear, replace_


def affine(out: int, columns: int, seed: int) -> Affine:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (out, columns), generator=draw).to(torch.int16)
    scale = torch.rand(out, columns // 32, generator=draw) * 0.1 + 0.01
    return Affine(codes, scale, torch.full_like(scale, 8.0), 4, 0)


def models() -> tuple[nn.Module, nn.Module]:
    """A model with packed layers, and one with the same values, dense."""
    torch.manual_seed(2)
    dense = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16))
    packed = {"0": affine(32, 64, 0), "2": affine(16, 32, 1)}
    with torch.no_grad():
        for name, one in packed.items():
            dense.get_submodule(name).weight.copy_(one.dequantize())
    return replace_(copy.deepcopy(dense), packed), dense


def both(config: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The two, with equal adapters that change something."""
    made = models()
    for model in made:
        torch.manual_seed(0)
        weft.adapt_(model, config, **options)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@pytest.mark.parametrize(
    "config", [LoRA(rank=4), LoRA(rank=2, start="pissa"), Bone(rank=4)], ids=["lora", "pissa", "bone"]
)
def test_values_and_gradients_are_those_on_dense_weights(config: Any) -> None:
    packed, dense = both(config)
    x = torch.randn(3, 64)
    torch.testing.assert_close(packed(x), dense(x))
    for model in (packed, dense):
        model(x).square().sum().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (packed, dense)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
    assert not any(p.requires_grad for n, p in packed.named_parameters() if n.endswith("bias"))


def test_lora_never_unpacks_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = both(LoRA(rank=2))

    def refuse(self: QuantizedLinear) -> Tensor:
        raise AssertionError("unpacked")

    monkeypatch.setattr(QuantizedLinear, "unpacked", refuse)
    packed(torch.randn(2, 64, requires_grad=True)).sum().backward()
    with switched(packed, ()):
        packed(torch.randn(2, 64))


def test_switching_merging_and_removing() -> None:
    plain, _ = models()
    packed, dense = both(LoRA(rank=2))
    x = torch.randn(3, 64)
    before = packed(x)
    with switched(packed, ()):
        assert torch.equal(packed(x), plain(x))
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(again(x), before)
        assert again[0].parametrizations.weight._layer[0] is again[0]
    assert torch.equal(packed[0].weight, packed[0].parametrizations.weight())
    torch.testing.assert_close(packed[0].weight, dense[0].weight)
    merge_(packed.eval())
    torch.testing.assert_close(packed(x), before)
    unmerge_(packed)
    assert torch.equal(packed(x), before)
    weft.adapt_(packed, LoRA(rank=1), name="second")
    assert torch.equal(packed(x), before)
    for name in ("default", "second"):
        remove_(packed, name)
    assert type(packed[0]) is QuantizedLinear
    assert torch.equal(packed(x), plain(x))


@pytest.mark.parametrize("config", [LoRA(rank=2), LoRA(rank=2, start="pissa"), WeightStandardization()], ids=str)
def test_inputs_rule_the_type(config: Any) -> None:
    packed, _ = models()
    weft.parametrize_(packed, config)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = copy.deepcopy(packed).to(dtype)
        x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
        made = model(x)
        made.sum().backward()
        assert made.dtype == dtype
        torch.testing.assert_close(made.float(), packed(x.float()), rtol=0.1, atol=0.1)
    if isinstance(config, LoRA):
        merge_(packed.eval())
        x = torch.randn(3, 64)
        torch.testing.assert_close(packed.bfloat16()(x.bfloat16()).float(), packed(x), rtol=0.1, atol=0.1)


def test_folders_of_dense_and_packed_models_are_one(tmp_path: Path) -> None:
    packed, dense = (nn.ModuleDict({"net": m}) for m in both(LoRA(rank=2)))
    x = torch.randn(3, 64)
    for form in ("peft", "weft", "lora"):
        save_adapter(packed, tmp_path / form, form=form)
        for model in map(nn.ModuleDict, ({"net": m} for m in models())):
            assert load_adapter_(model, tmp_path / form).base == "the same"
            torch.testing.assert_close(model["net"](x), packed["net"](x))
    save_adapter(dense, tmp_path / "dense")
    again = nn.ModuleDict({"net": models()[0]})
    load_adapter_(again, tmp_path / "dense")
    torch.testing.assert_close(again["net"](x), packed["net"](x))


def test_folders_say_which_layers_store_their_matrix_transposed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=40, bos_token_id=0, eos_token_id=0)
    dense = transformers.GPT2LMHeadModel(config).eval()
    packed = {f"transformer.h.0.attn.{n}": affine(out, 32, 0) for n, out in (("c_attn", 96), ("c_proj", 32))}
    model = replace_(copy.deepcopy(dense), packed)
    with torch.no_grad():
        for name, one in packed.items():
            dense.get_submodule(name).weight.copy_(one.dequantize().T)
    found = []
    for one in (dense, model):
        torch.manual_seed(0)
        weft.adapt_(one, LoRA(rank=2), where="c_attn")
        folder = tmp_path / str(len(found))
        assert save_adapter(one, folder).form == "peft"
        found.append(tuple((folder / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")))
    assert found[0] == found[1]
    assert b'"fan_in_fan_out": true' in found[0][0]
    tokens = torch.randint(40, (1, 6))
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits)


def test_other_functions_and_data() -> None:
    packed, dense = models()
    for model in (packed, dense):
        weft.parametrize_(model, WeightStandardization())
    x = torch.randn(3, 64)
    torch.testing.assert_close(packed(x), dense(x))
    packed, dense = models()
    data = [torch.randn(50, 64)]
    for model in (packed, dense):
        weft.adapt_(model, EVA(rank=2), data=data)
    torch.testing.assert_close(packed(x), dense(x))


def test_experts_are_adapted_where_they_are_named() -> None:
    experts = QuantizedExperts([affine(32, 64, i) for i in range(3)])
    model = nn.ModuleDict({"experts": experts, "other": QuantizedLinear.from_packed(affine(32, 64, 9))})
    assert list(weft.adapt_(model, LoRA(rank=2)).touched) == ["other.weight"]
    assert len(weft.adapt_(model, LoRA(rank=2), where="experts.*", name="experts").touched) == 3
    x = torch.randn(4, 64)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(0.1)
    change = 8.0 * experts.layers[1].parametrizations.weight[0].change(torch.zeros(32, 64))
    wanted = affine(32, 64, 1).dequantize() + change
    torch.testing.assert_close(nn.functional.linear(x, experts[1]), x @ wanted.T)
    torch.testing.assert_close(experts[1].dense(), wanted)


def test_what_cannot_be_is_said() -> None:
    packed, _ = both(LoRA(rank=2))
    with pytest.raises(RecipeError, match="cannot be baked into few bits"):
        weft.bake_(packed)
    with pytest.raises(RecipeError, match="save the adapter alone"):
        weft.plain_state_dict(packed)
    with pytest.raises(RecipeError, match="computed by a weight function"):
        packed[0].weight = torch.zeros(32, 64)


def test_it_compiles_whole() -> None:
    packed, _ = both(LoRA(rank=2))
    compiled: Any = torch.compile(copy.deepcopy(packed), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    torch.testing.assert_close(compiled(x), packed(x))
    compiled(x).sum().backward()
    packed(x).sum().backward()
    torch.testing.assert_close(
        compiled._orig_mod[0].parametrizations.weight[0].A.grad, packed[0].parametrizations.weight[0].A.grad
    )
