"""Formats of files: written and read back bit for bit; GPTQ and AWQ are their published layouts, by plain loops."""

import json
import re
from pathlib import Path

import pytest
import torch
from packed_weights import E8M0, affine, cases, codes, lookup, minifloat, write_model
from safetensors.torch import load_file
from torch import Tensor

import weft
from weft.errors import CheckpointError, RecipeError
from weft.packed import Activations, Affine, LowRank, Packed, Permuted
from weft.packed.formats import FORMATS, find_format, read_with

CASES = cases()


def bits_of(tensor: Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def test_every_format_that_writes_is_among_the_cases() -> None:
    assert {name for name, _ in CASES} == set(FORMATS) - {"mxfp4"}
    assert len(CASES) > 200


@pytest.mark.parametrize("name", sorted({n for n, _ in CASES}))
def test_files_are_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    form = find_format(name)
    for number, packed in enumerate(p for n, p in CASES if n == name):
        folder = tmp_path / str(number)
        assert form.refuses(packed) == ""
        write_model(folder, name, {"a.fc": packed}, {"norm.weight": torch.ones(3, dtype=torch.float16)})
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert read_with(config).method == form.method
        with weft.open(folder) as opened:
            assert list(opened) == ["a.fc.weight", "norm.weight"]
            assert opened.config == {"dtype": "float16"}
            assert opened["a.fc.weight"].natural_dtype.name == "F16"
            assert opened["a.fc.weight"].shape == packed.shape
            again = opened.packed["a.fc"]()
            assert torch.equal(opened["a.fc.weight"].torch(), packed.dequantize())
        written = load_file(folder / "model.safetensors")
        rewritten = form.write("a.fc", again, torch.float16)
        assert set(rewritten) | {"norm.weight"} == set(written)
        for tensor, value in rewritten.items():
            assert (value.dtype, value.shape) == (written[tensor].dtype, written[tensor].shape)
            assert bits_of(value) == bits_of(written[tensor])
        assert json.loads(json.dumps(form.config({"a.fc": again}, ["lm_head"]))) == config
        assert isinstance(again, Activations) is isinstance(packed, Activations)


def element(words: Tensor, row: int, place: int, bits: int) -> int:
    """A code of a row of words, bit by bit."""
    value = 0
    for bit in range(bits):
        word, shift = divmod(place * bits + bit, 32)
        value |= ((int(words[row, word]) & 0xFFFFFFFF) >> shift & 1) << bit
    return value


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_is_its_layout(bits: int, version: str) -> None:
    grid = affine(bits, 8, out=32, columns=32, symmetric=False)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    for packed in (grid, Permuted(grid, order)):
        made = find_format(version).write("P", packed, torch.float16)
        weight = packed.dequantize()
        assert made["P.qweight"].shape == (bits, 32)
        for o, i in [(o, i) for o in (0, 1, 17, 31) for i in range(32)]:
            code = element(made["P.qweight"].T, o, i, bits)
            group = int(made["P.g_idx"][i])
            zero = element(made["P.qzeros"], group, o, bits) + (version == "gptq")
            assert weight[o, i] == (code - zero) * made["P.scales"][group, o].float()
    if bits == 4:
        symmetric = find_format(version).write("P", affine(4, 8, out=32, columns=32), torch.float16)
        expected = {"gptq": 0x77777777, "gptq_v2": 0x88888888}[version]
        assert {w & 0xFFFFFFFF for w in symmetric["P.qzeros"].flatten().tolist()} == {expected}


def test_gptq_without_an_index_and_with_a_short_last_group(tmp_path: Path) -> None:
    grid = affine(4, 32, symmetric=False)
    tensors = find_format("gptq").write("P", grid, torch.float16)
    config = find_format("gptq").config({"P": grid}, [])
    plain = {n: t for n, t in tensors.items() if not n.endswith("g_idx")}
    assert torch.equal(find_format("gptq").read("P", plain.__getitem__, config).dequantize(), grid.dequantize())
    # 96 inputs in groups of 40: the last has 16
    index = torch.arange(96) // 40
    short = {**tensors, "P.g_idx": index.to(torch.int32)}
    expected = (grid.codes - grid.zero[:, index]) * grid.scale[:, index].float()
    assert torch.equal(find_format("gptq").read("P", short.__getitem__, config).dequantize(), expected)


def test_the_zero_point_that_the_first_version_cannot_say() -> None:
    grid = affine(4, 32, symmetric=False)
    low = Affine(grid.codes, grid.scale, torch.zeros_like(grid.scale), 4, 0)
    with pytest.raises(RecipeError, match="Take gptq_v2"):
        find_format("gptq").write("P", low, torch.float16)
    tensors = find_format("gptq_v2").write("P", low, torch.float16)
    tensors["P.qzeros"] = torch.full_like(tensors["P.qzeros"], -1)  # what −1 in each place is stored as
    config = find_format("gptq").config({"P": grid}, [])
    assert torch.equal(find_format("gptq").read("P", tensors.__getitem__, config).dequantize(), low.dequantize())


def test_awq_is_its_layout() -> None:
    grid = affine(4, 16, out=24, columns=32, symmetric=False)
    made = find_format("awq").write("P", grid, torch.float16)
    weight, places = grid.dequantize(), (0, 2, 4, 6, 1, 3, 5, 7)
    assert made["P.qweight"].shape == (32, 3)
    for o, i in [(o, i) for o in range(24) for i in (0, 15, 16, 31)]:
        place = places.index(o % 8)
        code, zero = (
            (int(made[f"P.{t}"][r, o // 8]) >> 4 * place) & 15 for t, r in (("qweight", i), ("qzeros", i // 16))
        )
        assert weight[o, i] == (code - zero) * made["P.scales"][i // 16, o].float()


def test_gptq_layers_that_differ_are_named() -> None:
    form = find_format("gptq")
    layers: dict[str, Packed] = {"a.0.fc": affine(4, 32), "a.1.fc": affine(4, 32), "a.2.fc": affine(8, 96)}
    config = form.config(layers, ["head"])
    assert (config["bits"], config["group_size"], config["desc_act"], config["sym"]) == (4, 32, False, True)
    apart = config["dynamic"]
    assert apart == {
        "-:^head$": {}, r"+:^a\.2\.fc$": {"bits": 8, "group_size": -1, "desc_act": False},
    }  # fmt: skip
    assert all(re.compile(rule[2:]) for rule in apart)
    assert form.files(layers, ["head"]) == {"quantize_config.json": config}


def test_groups_of_compressed_tensors() -> None:
    form = find_format("pack-quantized")
    layers: dict[str, Packed] = {
        "a.0.fc": affine(4, 32), "a.1.fc": affine(8, 96), "a.2.fc": affine(4, 32), "model.embed_tokens": affine(4, 32),
    }  # fmt: skip
    groups = form.config(layers, [])["config_groups"]
    assert [g["targets"] for g in groups.values()] == [["a.0.fc", "a.2.fc", "model.embed_tokens"], ["a.1.fc"]]
    assert [g["weights"]["num_bits"] for g in groups.values()] == [4, 8]
    del layers["a.1.fc"]
    one = form.config(layers, ["lm_head"])
    assert one["ignore"] == ["lm_head"]
    assert one["config_groups"]["group_0"]["targets"] == ["Linear", "model.embed_tokens"]


REFUSED: list[tuple[str, Packed, str]] = [
    ("pack-quantized", affine(9, 32), "2 to 8 bits"),
    ("pack-quantized", minifloat("e4m3", (1, 32)), "Take float-quantized"),
    ("pack-quantized", LowRank(affine(4, 32), torch.ones(64, 1), torch.ones(1, 96)), "not low-rank. Take weft"),
    ("int-quantized", affine(8, 96), "Take pack-quantized"),
    ("int-quantized", Activations(affine(9, 96), "int8"), "2 to 8 bits"),
    ("float-quantized", minifloat("e5m2", (1, 320)), "e4m3"),
    ("float-quantized", Activations(minifloat("e4m3", (1, 320)), "int8"), "inputs are e4m3"),
    ("nvfp4-pack-quantized", minifloat("e2m1", (1, 32)), "groups of 16"),
    ("nvfp4-pack-quantized", minifloat("e2m1", (1, 16)), "global scale"),
    ("mxfp4-pack-quantized", minifloat("e2m1", (1, 32), columns=330, dtype=E8M0), "whole groups of 32"),
    ("fp8", minifloat("e4m3", (128, 128)), "inputs"),
    ("fp8", Activations(minifloat("e4m3", (1, 320)), "e4m3"), "Take float-quantized"),
    ("fp8", Activations(minifloat("e4m3", (128, 128)), "e4m3"), "groups as wide as a block"),
    ("gptq", affine(5, 32), "2, 3, 4 or 8 bits"),
    ("gptq", affine(4, 32, out=61), "61 outputs of 4 bits do not fill whole words"),
    ("gptq", affine(4, 12, columns=36), "36 inputs"),
    ("awq", affine(8, 32), "4 bits"),
    ("awq", affine(4, 32, out=60), "60 outputs"),
    ("bitsandbytes", affine(4, 32), "sixteen"),
    ("bitsandbytes", lookup(torch.ones(1, 16), 7), "powers of two"),
    ("mxfp4", minifloat("e2m1", (1, 32), dtype=E8M0), "reads the experts"),
]


@pytest.mark.parametrize(("name", "packed", "why"), REFUSED, ids=[f"{n}-{w}" for n, _, w in REFUSED])
def test_what_a_format_cannot_say_is_refused(name: str, packed: Packed, why: str) -> None:
    assert why in find_format(name).refuses(packed)
    with pytest.raises(RecipeError, match=r"a\.fc cannot be written as " + name):
        find_format(name).write("a.fc", packed, torch.float16)


def test_real_zero_points_are_for_weft_alone() -> None:
    grid = affine(4, 32, symmetric=False)
    real = Affine(grid.codes, grid.scale, grid.zero + 0.5, 4, 0)
    for name in ("pack-quantized", "gptq", "gptq_v2", "awq"):
        assert find_format(name).refuses(real).endswith("Take the format weft.")
    assert find_format("weft").refuses(real) == ""


def test_scales_are_never_rounded_silently() -> None:
    grid = affine(4, 32, dtype=torch.float32)
    form = find_format("pack-quantized")
    with pytest.raises(RecipeError, match="without rounding its scales"):
        form.write("a.fc", grid, torch.bfloat16)
    fitted = form.fit(grid, torch.bfloat16)
    assert isinstance(fitted, Affine)
    assert torch.equal(fitted.scale, grid.scale.bfloat16())
    assert form.write("a.fc", fitted, torch.bfloat16)["a.fc.weight_scale"].dtype == torch.bfloat16
    real = minifloat("e2m1", (1, 16), dtype=torch.float32, global_scale=torch.tensor(0.3))
    four = find_format("nvfp4-pack-quantized")
    with pytest.raises(RecipeError, match="without rounding"):
        four.write("a.fc", real, torch.float16)
    four.write("a.fc", four.fit(real, torch.float16), torch.float16)


def test_settings_of_one_model_only() -> None:
    with pytest.raises(RecipeError, match=r"one group_size, got \[-1, 32\]"):
        find_format("awq").config({"a": affine(4, 32), "b": affine(4, 96)}, [])
    blocks = Activations(minifloat("e4m3", (128, 64), columns=320), "e4m3", None, 64)
    whole = Activations(minifloat("e4m3", (200, 320)), "e4m3")
    with pytest.raises(RecipeError, match="blocks of one size"):
        find_format("fp8").config({"a": blocks, "b": whole}, [])


def test_names_that_are_not_known() -> None:
    with pytest.raises(RecipeError, match="Did you mean gptq_v2 or gptq"):
        find_format("gptqv2")
    with pytest.raises(
        CheckpointError, match=r"'hqq'.*It reads awq, bitsandbytes, compressed-tensors, fp8, gptq, mxfp4, weft"
    ):
        read_with({"quant_method": "hqq"})
    with pytest.raises(CheckpointError, match="checkpoint_format 'marlin'"):
        read_with({"quant_method": "gptq", "checkpoint_format": "marlin"})
    with pytest.raises(CheckpointError, match="'gemm' with 4 bits, not 'gemv'"):
        read_with({"quant_method": "awq", "version": "GEMV"})
    assert read_with({"load_in_4bit": True}).name == "bitsandbytes"


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    blocks = codes(256, 3, 8, 2, 16).to(torch.uint8)
    scales = (120 + codes(10, 3, 8, 2, seed=1)).to(torch.uint8)
    tensors = {"m.experts.down_proj_blocks": blocks, "m.experts.down_proj_scales": scales}
    form = find_format("mxfp4")
    assert form.layers(tensors, {}) == {"m.experts.down_proj": sorted(tensors)}
    shape = form.shape("m.experts.down_proj", {n: tuple(t.shape) for n, t in tensors.items()}, tensors.__getitem__, {})
    weight = form.plain(form.read("m.experts.down_proj", tensors.__getitem__, {}).dequantize(), shape)
    assert weight.shape == shape == (3, 64, 8)
    levels = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for e, i, o in [(0, 0, 0), (1, 33, 7), (2, 63, 3)]:
        code = int(blocks[e, o, i // 32, i % 32 // 2]) >> 4 * (i % 2) & 15
        expected = (-1) ** (code >> 3) * levels[code & 7] * 2.0 ** (int(scales[e, o, i // 32]) - 127)
        assert weight[e, i, o] == expected
