"""Files against the libraries whose formats they are: compressed-tensors, transformers, bitsandbytes."""

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_weights import E8M0, affine, cases, codes, llama, lookup, minifloat, packed_llama
from torch import Tensor

import weft
from weft.packed import Activations, Lookup, Packed
from weft.packed.formats import find_format
from weft.packed.levels import dynamic_map

CT = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
Make = Callable[[str, int, int], Packed]


def bits_of(tensor: Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("name", CT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_compressed_tensors_packs_and_unpacks_the_same(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    form, peer = find_format(name), BaseCompressor.get_value_from_registry(name)
    for packed in (p for n, p in cases() if n == name):
        fitted = form.fit(packed, dtype)
        mine = {n[2:]: t for n, t in form.write("P", fitted, dtype).items()}
        [scheme] = QuantizationConfig(**form.config({"P": fitted}, [])).config_groups.values()
        theirs = peer.decompress(mine, scheme)
        weight = theirs["weight"]
        assert torch.equal(weight, fitted.dequantize().to(weight.dtype))
        # and back: the weight in float32 that they divide by the scales again
        state = {n: t for n, t in mine.items() if "scale" in n}
        state |= {"weight": fitted.dequantize(), "weight_scale": theirs["weight_scale"].float()}
        zero = theirs.get("weight_zero_point")
        made = peer.compress({**state, **({} if zero is None else {"weight_zero_point": zero})}, scheme)
        for part in set(made) & {"weight_packed", "weight", "weight_zero_point", "weight_shape"}:
            mine_is, theirs_is = mine[part], made[part]
            if name in CT[2:]:  # −0 and 0 are two codes, and one weight
                mine_is, theirs_is = (_magnitudes(t, part) for t in (mine_is, theirs_is))
            assert bits_of(mine_is) == bits_of(theirs_is), part


def _magnitudes(tensor: Tensor, part: str) -> Tensor:
    if part == "weight":
        return torch.where(tensor.float() == 0, 0, tensor.float())
    halves = torch.stack([tensor & 15, tensor >> 4])
    return torch.where(halves == 8, 0, halves)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()
    return llama(tmp_path_factory.mktemp("llama") / "model")


def loaded(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(6)[None]).logits


def differs(folder: Path, state: dict[str, Tensor]) -> list[str]:
    """Tensors of the opened folder, in the model's type, that are not those of a loaded model."""
    with weft.open(folder) as opened:
        assert len(opened) > 10
        return [
            n for n in opened if n not in state or not torch.equal(opened[n].torch().bfloat16(), state[n].bfloat16())
        ]


def test_a_model_loads_in_transformers(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    counter = itertools.count()

    def mixed(layer: str, out: int, columns: int) -> Packed:
        i = next(counter)
        return affine((4, 8, 3)[i % 3], (32, 64)[i % 2], out=out, columns=columns, symmetric=i % 4 != 0)

    made: dict[str, tuple[str, Make]] = {
        "symmetric": (CT[0], lambda _, o, i: affine(4, 32, out=o, columns=i)),
        "asymmetric": (CT[0], lambda _, o, i: affine(4, 32, out=o, columns=i, symmetric=False)),
        "mixed": (CT[0], mixed),
        "int": (CT[1], lambda _, o, i: Activations(affine(8, i, out=o, columns=i), "int8")),
        "channel": (CT[2], lambda _, o, i: Activations(minifloat("e4m3", (1, i), out=o, columns=i), "e4m3")),
        "tensor": (
            CT[2],
            lambda _, o, i: Activations(minifloat("e4m3", (o, i), out=o, columns=i), "e4m3", torch.tensor(0.5)),
        ),
        "nvfp4": (
            CT[3],
            lambda _, o, i: minifloat(
                "e2m1", (1, 16), out=o, columns=i, dtype=torch.float8_e4m3fn, global_scale=torch.tensor(0.013)
            ),
        ),
        "mxfp4": (CT[4], lambda _, o, i: minifloat("e2m1", (1, 32), out=o, columns=i, dtype=E8M0)),
    }
    for kind, (name, make) in made.items():
        folder = tmp_path / kind
        packed_llama(model, folder, name, make, heads=kind == "symmetric")
        plain = loaded(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
        assert differs(folder, plain.state_dict()) == [], kind
        if name == CT[0]:  # no inputs are quantised: as it loads by itself it computes the same
            assert torch.equal(logits(loaded(folder)), logits(plain)), kind


def test_floats_of_8_bits_load_in_transformers(model: Path, tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config

    def make(layer: str, out: int, columns: int) -> Packed:
        return Activations(minifloat("e4m3", (32, 32), out=out, columns=columns, dtype=torch.float32), "e4m3", None, 32)

    packed_llama(model, tmp_path / "fp8", "fp8", make)
    plain = loaded(tmp_path / "fp8", quantization_config=FineGrainedFP8Config(dequantize=True))
    assert differs(tmp_path / "fp8", plain.state_dict()) == []


def test_experts_are_those_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = codes(256, 3, 8, 2, 16).to(torch.uint8), (120 + codes(10, 3, 8, 2)).to(torch.uint8)
    tensors, form = {"P_blocks": blocks, "P_scales": scales}, find_format("mxfp4")
    weight = form.plain(form.read("P", tensors.__getitem__, {}).dequantize(), (3, 64, 8))
    assert torch.equal(weight, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


def test_awq_is_what_compressed_tensors_converts() -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    form, other = find_format("awq"), find_format("pack-quantized")
    for symmetric in (False, True):
        grid = affine(4, 32, symmetric=symmetric)
        made = converters.AutoAWQConverter(group_size=32).process(form.write("a.fc", grid, torch.float16))
        config = other.config({"a.fc": affine(4, 32, symmetric=False)}, [])
        again = other.read("a.fc", made.__getitem__, config)
        assert torch.equal(again.dequantize(), grid.dequantize())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@torch.compiler.set_stance("force_eager")  # bitsandbytes compiles its functions for each shape
def test_bitsandbytes_files(kind: str, model: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    form = find_format("bitsandbytes")
    assert torch.equal(functional.create_dynamic_map(), dynamic_map())
    generator = torch.Generator().manual_seed(0)
    shapes = ((33, 130), (64, 128), (300, 302), (3, 5))
    for shape, nested, size in itertools.product(shapes, (False, True), (64, 128)):
        weight = 0.02 * torch.randn(shape, generator=generator)
        packed, state = functional.quantize_4bit(weight, blocksize=size, quant_type=kind, compress_statistics=nested)
        files = {"P.weight": packed, **{f"P.weight.{n}": t for n, t in state.as_dict(packed=True).items()}}
        made = form.read("P", files.__getitem__, {})
        assert torch.equal(made.dequantize(), functional.dequantize_4bit(packed, state))
        assert form.shape("P", {n: tuple(t.shape) for n, t in files.items()}, files.__getitem__, {}) == shape
        written = form.write("P", made, torch.float32)
        if weight.numel() % 2:  # half a byte belongs to no weight
            written["P.weight"][-1] |= files["P.weight"][-1] & 15
        assert {n: (t.dtype, t.shape, bits_of(t)) for n, t in written.items()} == {
            n: (t.dtype, t.shape, bits_of(t)) for n, t in files.items()
        }
    levels = functional.get_4bit_type(kind, device="cpu")[None]
    made_by: dict[str, Make] = {
        "plain": lambda _, o, i: lookup(levels, 64, out=o, columns=i),
        "nested": lambda _, o, i: lookup(levels, 64, out=o, columns=i, nested=True),
    }
    for name, make in made_by.items():
        folder = tmp_path / name
        packed_llama(model, folder, form.name, make)
        parameters = dict(loaded(folder).named_parameters())
        packed_ones = [n for n, p in parameters.items() if getattr(p, "quant_state", None) is not None]
        assert len(packed_ones) == 14
        state = {
            n: functional.dequantize_4bit(p, p.quant_state) if n in packed_ones else p for n, p in parameters.items()
        }
        assert differs(folder, state) == []


def test_bitsandbytes_with_other_maps_and_in_8_bits() -> None:
    form = find_format("bitsandbytes")
    levels = torch.linspace(-1, 1, 16)[None]
    made = lookup(levels, 64, nested=True)
    files = form.write("P", made, torch.float32)
    other = dynamic_map().clone()
    other[3] += 1e-3
    read = form.read("P", {**files, "P.weight.nested_quant_map": other}.__getitem__, {})
    assert isinstance(read, Lookup)
    assert read.nested_scale is None
    assert made.nested_scale is not None
    assert made.mean is not None
    scales = other[made.scale.long()] * made.nested_scale.repeat_interleave(256)[: len(made.scale)] + made.mean
    assert torch.equal(read.scale, scales)
    functional = pytest.importorskip("bitsandbytes.functional")
    whole, rows = codes(256, 6, 40).sub(128).to(torch.int8), torch.linspace(0.5, 2, 6)
    eight = form.read("P", {"P.weight": whole, "P.SCB": rows}.__getitem__, {})
    expected = functional.int8_vectorwise_dequant(whole, rows)
    torch.testing.assert_close(eight.dequantize(), expected, rtol=2e-7, atol=0)


def test_configs_are_what_the_libraries_take(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = find_format("gptq").config({"a.fc": affine(4, 32)}, ["lm_head"])
    taken = transformers.GPTQConfig(**{k: v for k, v in config.items() if k != "quant_method"})
    assert (taken.bits, taken.group_size, taken.desc_act, taken.sym) == (4, 32, False, True)
    assert json.loads(json.dumps(config)) == config
