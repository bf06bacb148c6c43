"""Schemes by their names: what they write is what compressed-tensors calls so, and loads in transformers bit for bit."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
from weft.errors import RecipeError
from weft.packed import Activations, quantize_inputs
from weft.quantize import (
    GPTQ,
    NVFP4,
    RTN,
    QuantizedInputs,
    find_scheme,
    load_quantized,
    nvfp4_codes,
    quantize_,
    quantize_model,
)
from weft.quantize.inputs import LARGEST
from weft.quantize.microscaling import Microscaling, microscaled_codes
from weft.quantize.schemes import SCHEMES

presets = pytest.importorskip("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
NAMES = sorted(n for n in presets if n != "UNQUANTIZED")
FACTS = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "scale_dtype")
FROM_DATA = ("FP8", "NVFP4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block whose matrices divide into blocks of 128, and into more than one."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    made = tmp_path_factory.mktemp("schemes") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made)
    return made


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(64, (4, 16), generator=generator)} for _ in range(2)]


def theirs(made: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(made, **options)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(12)[None]).logits.float()


def said(args: Any) -> dict[str, Any]:
    """The facts of compressed-tensors' arguments that decide what numbers mean."""
    values = args if isinstance(args, dict) else args.model_dump()
    found = {k: values.get(k) for k in FACTS if values.get(k) is not None}
    return {k: getattr(v, "value", v) if k != "scale_dtype" else str(v) for k, v in found.items()}


def test_every_preset_is_a_scheme() -> None:
    assert set(NAMES) <= set(SCHEMES)
    assert len(NAMES) > 25
    with pytest.raises(RecipeError, match="take the model as it is"):
        find_scheme("unquantized")
    with pytest.raises(RecipeError, match=r"no scheme 'NVFP4A8'.*NVFP4A16"):
        find_scheme("NVFP4A8")


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_a_scheme_writes(name: str, folder: Path, tmp_path: Path) -> None:
    """As it is: the configuration is the preset's, weights are those that weft reads, bit for bit."""
    made = quantize_model(folder, tmp_path / "out", name, batches() if name in FROM_DATA else None)
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["ignore"] == ["lm_head"]
    [group] = config["config_groups"].values()
    assert said(group["weights"]) == said(presets[name]["weights"])
    inputs = presets[name].get("input_activations")
    assert (group["input_activations"] is None) is (inputs is None)
    if inputs is not None:
        assert said(group["input_activations"]) == said(inputs)
    model = theirs(made)
    logits(model)  # the first pass unpacks the weights, to the model's type
    state = torch.nn.Module.float(model).state_dict()  # transformers refuses to do so
    with weft.open(made) as opened:
        packed = {n: load() for n, load in opened.packed.items()}
        assert len(packed) == 7
        for layer in packed:
            weight = opened[f"{layer}.weight"].torch()
            assert torch.equal(weight.bfloat16().float(), state[f"{layer}.weight"]), layer
            state[f"{layer}.weight"].copy_(weight)  # not rounded, for what follows
    expected = logits(model)  # in float32, with inputs quantised by compressed-tensors
    mine = theirs(folder).float()
    for layer, one in packed.items():
        place = mine.get_submodule(layer)
        place.weight.data.copy_(one.dequantize())
        if isinstance(one, Activations):
            facts = (one.kind, one.input_scale, one.group_size)
            place.register_forward_pre_hook(lambda _, args, facts=facts: (quantize_inputs(args[0], *facts),))
    away = float((logits(mine) - expected).norm() / expected.norm())
    # scales of int8 are over 127 as vLLM's are, those of compressed-tensors over 127.5
    assert away < (0.03 if name.endswith("A8") or name == "INT8" else 1e-6), away
    found = logits(load_quantized(made, backend="dequantize").float())
    # packed layers take one scale for a token's inputs, also where files say groups of them
    assert float((found - logits(mine)).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("kind", ["e4m3", "nvfp4", "mxfp4", "mxfp8", "int4"])
def test_inputs_are_those_of_compressed_tensors(kind: str) -> None:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam

    name = {"e4m3": "FP8_DYNAMIC", "int4": "W4A4"}.get(kind, kind.upper())
    args = presets[name]["input_activations"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 256, generator=generator) * torch.randn(256, generator=generator).exp()
    common = generate_gparam(x.min(), x.max()) if kind == "nvfp4" else None
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale=common)
    expected = fake_quantize(x, scale, zero, args, global_scale=common)
    found = quantize_inputs(x, kind, None if common is None else 1 / common.double().reshape(()))
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert float((found - x).norm() / x.norm()) < {"int4": 0.3, "e4m3": 0.03, "mxfp8": 0.04}.get(kind, 0.15)


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16", "MXFP8A16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_those_of_compressed_tensors(name: str, dtype: torch.dtype) -> None:
    """Scales and numbers of the same weights, chosen by their rules: bit for bit."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = presets[name]["weights"]
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(384, 256, generator=generator)
    weight[::5] *= torch.randn(77, 1, generator=generator).exp()
    weight[3, :64] = 0
    weight = weight.to(dtype).float()
    groups = weight.unflatten(1, (-1, args.group_size))
    common = generate_gparam(weight.min(), weight.max()) if name == "NVFP4A16" else None
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=common)
    values = quantize(weight, scale.float(), zero.float(), args, global_scale=common)
    if common is not None:
        mine = nvfp4_codes(weight)
        assert float(1 / mine.global_scale) == float(common)  # type: ignore[operator]
        step = (scale.float() / common).repeat_interleave(args.group_size, 1)
    else:
        mine = microscaled_codes(weight, Microscaling(name.removesuffix("A16").lower()))
        step = scale.float().repeat_interleave(args.group_size, 1)
    assert torch.equal(mine.scale.float(), scale.float())
    torch.testing.assert_close(mine.dequantize(), values * step, rtol=1e-7, atol=0)


def test_nvfp4_is_the_nearest_number_by_brute_force() -> None:
    weight = 0.1 * torch.randn(6, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float()
    made = nvfp4_codes(weight)
    assert made.global_scale is not None
    steps = (made.scale.double() * made.global_scale).repeat_interleave(16, 1)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    levels = torch.cat([levels, -levels])
    nearest = (steps.unsqueeze(-1) * levels - weight.double().unsqueeze(-1)).abs().amin(-1)
    found = (made.dequantize().double() - weight.double()).abs()
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-7)
    assert float(made.scale.float().max()) == 448


def test_layers_that_become_one_share_the_global_scale(folder: Path, tmp_path: Path) -> None:
    made = quantize_model(folder, tmp_path / "out", "NVFP4", batches())
    with weft.open(made) as opened:
        packed: dict[str, Any] = {n.rpartition(".")[2]: load() for n, load in opened.packed.items()}
    assert all(isinstance(p, Activations) and p.kind == "nvfp4" for p in packed.values())
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        first, *others = (packed[n] for n in names)
        for one in others:
            assert one.inner.global_scale == first.inner.global_scale
            assert one.input_scale == first.input_scale  # which are the same inputs
    assert packed["o_proj"].inner.global_scale != packed["q_proj"].inner.global_scale


def test_static_scales_are_the_largest_inputs(folder: Path, tmp_path: Path) -> None:
    """In memory and on disk, counted here by a hook of its own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer, seen = model.model.layers[0].mlp.up_proj, []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    for batch in batches():
        model(**batch)
    handle.remove()
    # q, k and v come before, and move what this layer is given
    made = quantize_(model, {"*.up_proj": QuantizedInputs(RTN(8, 0), "e4m3", static=True)}, batches())
    one = made.packed["model.layers.0.mlp.up_proj"]
    assert isinstance(one, Activations)
    torch.testing.assert_close(one.input_scale, torch.stack(seen).max().detach() / LARGEST["e4m3"])
    with pytest.raises(RecipeError, match="statistics of data"):
        quantize_model(folder, tmp_path / "x", "FP8")


@pytest.mark.filterwarnings("ignore:.*too few rows")
def test_experts_without_tokens_take_the_scale_of_the_others(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    data = [{"input_ids": torch.zeros(1, 40, dtype=torch.long)}]  # one word: one expert or two
    made = quantize_model(tmp_path / "model", tmp_path / "out", "NVFP4", data)
    with weft.open(made) as opened:
        packed: dict[str, Any] = {n: load() for n, load in opened.packed.items()}
    experts = {n: p for n, p in packed.items() if n.endswith(".w1")}
    assert len(experts) == 8
    assert len({float(p.input_scale) for p in experts.values()}) == 1
    few = [n for n, f in json.loads((made / "weft.json").read_text())["layers"].items() if "few_rows" in f]
    assert len(few) == 0  # each has a scale


@pytest.mark.parametrize("scheme", ["W4A16", "W4A8", "W4AFP8", "W8A8"])
def test_gptq_makes_schemes_of_whole_numbers(scheme: str, folder: Path, tmp_path: Path) -> None:
    named = find_scheme(scheme)
    known = {k: v for k, v in named.parameters.items() if k in ("bits", "group_size", "kind")}
    config = named.around(GPTQ(**known))
    errors = {}
    for label, one in (("gptq", config), ("rtn", scheme)):
        made = quantize_model(folder, tmp_path / label, one, batches(), format=named.file_format)  # type: ignore[arg-type]
        layers = json.loads((made / "weft.json").read_text())["layers"]
        errors[label] = layers
        [group] = json.loads((made / "config.json").read_text())["quantization_config"]["config_groups"].values()
        assert said(group["weights"]) == said(presets[scheme]["weights"])
    assert all("output_error" in f for f in errors["gptq"].values())
    model = theirs(tmp_path / "gptq")
    logits(model)
    with weft.open(tmp_path / "gptq") as opened:
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(opened[name].torch().bfloat16(), model.state_dict()[name].bfloat16())


def test_vllm_takes_some_inputs_only(folder: Path, tmp_path: Path) -> None:
    from weft.quantize.serving import check_serving

    for name, fine in (("W4A8", True), ("W8A8", True), ("W4AFP8", True), ("W3A8", False), ("W4A4", False)):
        with weft.open(quantize_model(folder, tmp_path / name, name)) as checkpoint:
            errors = [f.text for f in check_serving(checkpoint) if f.level == "error"]
            assert bool(errors) is not fine, (name, errors)
            assert not [f for f in check_serving(checkpoint, "transformers") if f.level == "error"]
    assert "--scheme W8A8, W4A8 or W4AFP8" in errors[0]


def test_in_memory_by_name(folder: Path, tmp_path: Path) -> None:
    model = theirs(folder)
    quantize_(model, "NVFP4", batches())
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantizedLinear"
    made = load_quantized(quantize_model(folder, tmp_path / "out", "NVFP4", batches()))
    torch.testing.assert_close(logits(model), logits(made), rtol=0, atol=0)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(RecipeError, match=r"such as RTN\(\)"):
        QuantizedInputs("rtn", "int8")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="groups of 16"):
        NVFP4().fit("a", torch.ones(2, 24), None)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="groups of 128, in which they are quantised"):
        find_scheme("FP8_BLOCK").config().fit("a", torch.ones(2, 96), None)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="int8, int4"):
        QuantizedInputs(RTN(), "int9")
    with pytest.raises(RecipeError, match="leave static"):
        QuantizedInputs(RTN(), "e4m3", static=True, group_size=32)
