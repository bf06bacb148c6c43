"""Quantised models on disk: written in a format, loaded by transformers and by weft, equal to the model in memory."""

import copy
import json
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
sys.path.insert(0, str(Path(__file__).parents[1] / "packed"))
from architectures import MODELS, build

import weft
from weft.errors import RecipeError
from weft.packed import Packed, QuantizedEmbedding, QuantizedLinear
from weft.quantize import GPTQ, HQQ, RTN, Codebook, load_quantized, quantize_, quantize_model

FEW = "ignore:.*too few rows"


def saved(tmp_path: Path, name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, list[Any], Path]:
    model, batches = build(name, dtype)
    model.save_pretrained(tmp_path / "model")
    return model, batches, tmp_path / "model"


@torch.no_grad()
def outputs(model: Any, batches: list[Any]) -> torch.Tensor:
    return torch.cat([model(**b)[0].float().flatten() for b in batches])


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_architecture_comes_back(name: str, tmp_path: Path) -> None:
    """The folder, read as plain weights and run on packed ones, is the model that was quantised in memory."""
    model, batches, folder = saved(tmp_path, name)
    made = quantize_model(folder, tmp_path / "out", {"*": GPTQ(4, 8), "down_proj": RTN(8, 8)}, batches, format="weft")
    size = sum(p.stat().st_size for p in made.glob("*.safetensors"))
    share = 0.95 if name == "gpt_oss" else 0.9  # whose experts are one tensor on disk, and stay as they are
    assert size < share * sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    loaded = load_quantized(made, backend="dequantize")
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) > 2
    dense = quantize_model(
        folder, tmp_path / "dense", {"*": GPTQ(4, 8), "down_proj": RTN(8, 8)}, batches, format="dense"
    )
    reread = type(model).from_pretrained(dense).eval()
    reread.config._experts_implementation = "eager"
    torch.testing.assert_close(outputs(loaded, batches), outputs(reread, batches), rtol=1e-4, atol=1e-5)
    with weft.open(made) as packed, weft.open(dense) as plain:
        assert packed.keys() == plain.keys()
        for tensor in plain:
            assert torch.equal(packed[tensor].torch(), plain[tensor].torch().float()), tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_transformers_loads_compressed_tensors(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    _, batches, folder = saved(tmp_path, "llama", dtype)
    made = quantize_model(folder, tmp_path / "out", GPTQ(4, 16, kind), batches)
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        unpacked = CompressedTensorsConfig(run_compressed=False)
        theirs = AutoModelForCausalLM.from_pretrained(made, dtype=dtype, quantization_config=unpacked)
    with weft.open(made) as mine:
        for name, weight in theirs.named_parameters():
            if name.endswith("_proj.weight"):
                assert torch.equal(mine[name].torch().to(dtype), weight)


def test_formats_by_configuration(tmp_path: Path) -> None:
    _, batches, folder = saved(tmp_path, "llama")
    for config, expected in (
        (HQQ(4, 16), "weft"),
        (Codebook(), "weft"),
        ({"*": RTN(4, 16), "q_proj": Codebook()}, "weft"),
    ):
        made = quantize_model(folder, tmp_path / "out", config, batches, force=True)
        assert json.loads((made / "config.json").read_text())["quantization_config"]["quant_method"] == expected
    for form, method in (("gptq", "gptq"), ("awq", "awq"), ("gptq_v2", "gptq")):
        made = quantize_model(folder, tmp_path / "out", RTN(4, 16), format=form, force=True)
        assert json.loads((made / "config.json").read_text())["quantization_config"]["quant_method"] == method
        assert load_quantized(made) is not None
    with pytest.raises(RecipeError, match="cannot be written as pack-quantized"):
        quantize_model(folder, tmp_path / "bad", Codebook(), format="pack-quantized")
    with pytest.raises(RecipeError, match=r"no format 'gptk'.*gptq"):
        quantize_model(folder, tmp_path / "bad", RTN(4, 16), format="gptk")
    assert not list(tmp_path.glob("bad*"))


def test_embeddings_and_head_by_name(tmp_path: Path) -> None:
    model, batches, folder = saved(tmp_path, "llama")
    config = {"*": RTN(4, 16), "lm_head": GPTQ(8, 16), "embed_tokens": RTN(8, 16)}
    made = quantize_model(folder, tmp_path / "out", config, batches, format="weft")
    loaded = load_quantized(made, backend="dequantize")
    assert isinstance(loaded.lm_head, QuantizedLinear)
    assert isinstance(loaded.model.embed_tokens, QuantizedEmbedding)
    in_memory = copy.deepcopy(model)
    found = quantize_(in_memory, config, batches, backend="dequantize")
    assert {"lm_head", "model.embed_tokens"} <= found.packed.keys()
    torch.testing.assert_close(outputs(loaded, batches), outputs(in_memory, batches))
    report = json.loads((made / "weft.json").read_text())["layers"]
    assert report["lm_head"]["output_error"] < 1e-3  # with the Gram matrix of its inputs


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_in_memory_as_on_disk(name: str, tmp_path: Path) -> None:
    model, batches, folder = saved(tmp_path, name)
    made = quantize_model(folder, tmp_path / "out", GPTQ(4, 8), batches, format="weft")
    loaded = load_quantized(made, backend="dequantize")
    quantize_(model, GPTQ(4, 8), batches, backend="dequantize")
    torch.testing.assert_close(outputs(model, batches), outputs(loaded, batches), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) > 2


def test_plain_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    data = [torch.randn(32, 1, 4, 4) for _ in range(4)]
    before = torch.cat([model(x) for x in data]).detach()
    found = quantize_(model, GPTQ(8, 0), data)
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[3], QuantizedLinear)
    assert {"0", "3", "5"} == found.packed.keys()
    after = torch.cat([model(x) for x in data]).detach()
    assert float((after - before).norm() / before.norm()) < 0.02
    dense = nn.Sequential(nn.Linear(8, 4))
    expected = RTN(4, 4).fit("0", dense[0].weight.detach(), None).dequantize()  # type: ignore[arg-type]
    quantize_(dense, RTN(4, 4), pack=False)
    assert torch.equal(dense[0].weight, expected)


def test_quantising_what_is_quantised(tmp_path: Path) -> None:
    """Its packed weights are unpacked; the new configuration takes the place of the old one."""
    _, batches, folder = saved(tmp_path, "llama")
    first = quantize_model(folder, tmp_path / "first", RTN(8, 16), format="gptq")
    second = quantize_model(first, tmp_path / "second", RTN(4, 16), batches)
    config = json.loads((second / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert not (second / "quantize_config.json").exists()
    plain = quantize_model(first, tmp_path / "plain", RTN(4, 16), format="dense")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    with weft.open(second) as one, weft.open(plain) as other:
        for name in other:
            assert torch.equal(one[name].torch(), other[name].torch().float()), name


def test_a_check_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    """And finds what it found with all of them: it looks at outlines."""
    from weft.quantize.serving import check_serving

    _, _, folder = saved(tmp_path, "llama")
    made = quantize_model(folder, tmp_path / "out", {"*": RTN(4, 16), "q_proj": RTN(8, 8)})
    alive: list[weakref.ref[Any]] = []
    most = 0

    def counted(load: Callable[[], Packed]) -> Callable[[], Packed]:
        def loaded() -> Packed:
            nonlocal most
            one = load()
            alive.append(weakref.ref(one))
            most = max(most, sum(r() is not None for r in alive))
            return one

        return loaded

    with weft.open(made) as checkpoint:
        checkpoint.packed = {name: counted(load) for name, load in checkpoint.packed.items()}
        found = check_serving(checkpoint)
        assert len(alive) == len(checkpoint.packed) > 10
    assert most == 1
    [fused] = [f for f in found if f.level == "error"]
    assert "one layer of q, k and v" in fused.text
    assert {n.rpartition(".")[2] for n in fused.layers} == {"q_proj", "k_proj", "v_proj"}
    assert any("groups of 32, 64, 128" in f.text for f in found)


def test_rows_of_a_layer_are_packed_apart() -> None:
    """Of every form that has rows, without packing the whole; the blocks of a matrix stay where rows are whole ones."""
    from packed_weights import every_form, minifloat

    from weft.packed import Lookup, Minifloat
    from weft.quantize.files import _rows

    for name, one in every_form().items():
        rows, weight = one.shape[0], one.dequantize()
        for start, stop in ((0, 8), (8, rows), (5, 6)):
            part = _rows(one, start, stop)
            turned = name in ("transposed", "permuted") or (name == "activations")
            if part is None:
                assert turned or isinstance(one, Lookup), name
            else:
                torch.testing.assert_close(part.dequantize(), weight[start:stop], rtol=1e-6, atol=1e-6)
    blocks = minifloat("e4m3", (128, 128), out=256)
    part = _rows(blocks, 128, 256)
    assert isinstance(part, Minifloat)
    assert (part.block, part.scale.shape) == ((128, 128), (1, 3))
