"""Quantised models through ``weft.open`` and the command line; damaged and hostile ones are refused by name."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_weights import E8M0, affine, cases, llama, lookup, minifloat, packed_llama, positive, write_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import weft
from weft.cli.app import app
from weft.errors import CheckpointError
from weft.packed import Activations, Affine, LowRank, Packed, Permuted
from weft.packed.formats import find_format

ORDER = torch.arange(96).flip(0).to(torch.int32)
EXAMPLES: dict[str, tuple[str, Packed]] = {
    "pack": ("pack-quantized", affine(4, 32, symmetric=False)),
    "channel": ("pack-quantized", affine(3, 96)),
    "int": ("int-quantized", Activations(affine(8, 96), "int8")),
    "float": ("float-quantized", minifloat("e4m3", (128, 128))),
    "nvfp4": ("nvfp4-pack-quantized", minifloat("e2m1", (1, 16), dtype=torch.float16, global_scale=torch.tensor(0.25))),
    "mxfp4": ("mxfp4-pack-quantized", minifloat("e2m1", (1, 32), dtype=E8M0)),
    "fp8": ("fp8", Activations(minifloat("e4m3", (128, 128), columns=256), "e4m3", None, 128)),
    "gptq": ("gptq", Permuted(affine(4, 32), ORDER)),
    "awq": ("awq", affine(4, 32)),
    "bnb": ("bitsandbytes", lookup(torch.linspace(-1, 1, 16)[None], 64)),
    "nested": ("bitsandbytes", lookup(torch.linspace(-1, 1, 16)[None], 64, nested=True)),
    "weft": ("weft", LowRank(affine(3, 32), positive(64, 2), positive(2, 96))),
}


@pytest.fixture
def example(tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        name, packed = EXAMPLES[kind]
        write_model(tmp_path / kind, name, {"a.fc": packed}, {"norm.weight": torch.ones(4)})
        return tmp_path / kind

    return make


def change(folder: Path, tensors: Callable[[dict[str, Any]], Any], config: Callable[[dict[str, Any]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    tensors(state)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    config(settings["quantization_config"])
    (folder / "config.json").write_text(json.dumps(settings))


def read_all(folder: Path) -> None:
    with weft.open(folder) as opened:
        for tensor in opened.values():
            tensor.torch()


def set_state(t: dict[str, Any], **changes: Any) -> None:
    name = next(n for n in t if "quant_state" in n)
    state = {**json.loads(bytes(t[name].tolist())), **changes}
    t[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def weights(c: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = c["config_groups"]["group_0"]["weights"]
    return found


def keep(value: Any) -> None:
    """No change."""


W = "a.fc.weight"
HOSTILE: list[tuple[str, Callable[[dict[str, Any]], Any], Callable[[dict[str, Any]], Any], str]] = [
    ("pack", lambda t: t.pop(f"{W}_scale"), keep, r"a\.fc\.weight_scale is missing"),
    ("pack", lambda t: t.pop(f"{W}_shape"), keep, r"a\.fc\.weight_shape is missing"),
    ("pack", lambda t: t.pop(f"{W}_zero_point"), keep, r"a\.fc\.weight_zero_point is missing"),
    ("pack", lambda t: t.update({f"{W}_shape": torch.tensor([64, 10**12])}), keep, r"weight_shape says .* do not fit"),
    ("pack", lambda t: t.update({f"{W}_shape": torch.tensor([64.0, 96])}), keep, "weight_shape is int64 or int32"),
    ("pack", lambda t: t.update({f"{W}_scale": t[f"{W}_scale"][1:]}), keep, r"weight_scale is \(out, groups\)"),
    ("pack", lambda t: t.update({f"{W}_scale": t[f"{W}_scale"].int()}), keep, "weight_scale is floating point"),
    ("pack", lambda t: t.update({f"{W}_packed": t[f"{W}_packed"][:, 1:]}), keep, "do not fit"),
    ("pack", lambda t: t.update({f"{W}_packed": t[f"{W}_packed"].long()}), keep, "weight_packed is int32"),
    ("pack", lambda t: t.update({f"{W}_g_idx": torch.full((96,), 9)}), keep, "weight_g_idx has groups 9 to 9"),
    ("pack", keep, lambda c: weights(c).update(num_bits=10**9), "do not fit"),
    ("pack", keep, lambda c: weights(c).update(num_bits="four"), "num_bits is a whole number"),
    ("pack", keep, lambda c: c.pop("config_groups"), "no config_groups"),
    ("pack", keep, lambda c: c.update(config_groups={"W4A16": ["Linear"]}), "no config_groups"),
    ("pack", keep, lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
    ("pack", keep, lambda c: c.update(transform_config={"config_groups": {"r": {}}}), "rotate"),
    ("pack", keep, lambda c: c["config_groups"]["group_0"].update(targets=["re:("]), "no expression"),
    ("channel", lambda t: t.update({f"{W}_scale": torch.ones(64, 7)}), keep, "7 groups, which do not divide"),
    ("int", lambda t: t.update({W: t[W].short()}), keep, r"a\.fc\.weight is int8"),
    ("int", keep, lambda c: weights(c).update(num_bits=4), "no signed numbers of 4 bits"),
    ("int", keep, lambda c: weights(c).update(num_bits=10**9), "no signed numbers"),
    ("float", lambda t: t.update({f"{W}_scale": torch.ones(2, 2)}), keep, r"are \[2, 3\], got \[2, 2\]"),
    ("float", keep, lambda c: weights(c).update(block_structure=[0, 128]), "block_structure|strategy 'block'"),
    ("float", lambda t: t.update({W: t[W].view(torch.uint8)}), keep, "float8_e4m3fn"),
    ("nvfp4", lambda t: t.pop(f"{W}_global_scale"), keep, "weight_global_scale is missing"),
    ("nvfp4", lambda t: t.update({f"{W}_global_scale": torch.zeros(1)}), keep, "not 0"),
    ("mxfp4", lambda t: t.update({f"{W}_scale": t[f"{W}_scale"][:, 1:]}), keep, "weight_scale is"),
    ("fp8", lambda t: t.update({f"{W}_scale_inv": torch.ones(9, 9)}), keep, r"got \[9, 9\]"),
    ("fp8", keep, lambda c: c.update(weight_block_size="big"), "weight_block_size"),
    ("gptq", lambda t: t.pop("a.fc.scales"), keep, r"a\.fc\.scales is missing"),
    ("gptq", lambda t: t.update({"a.fc.g_idx": t["a.fc.g_idx"] + 1}), keep, r"g_idx has groups 1 to 3"),
    ("gptq", lambda t: t.update({"a.fc.g_idx": -t["a.fc.g_idx"]}), keep, r"g_idx has groups -2 to 0"),
    ("gptq", lambda t: t.update({"a.fc.g_idx": t["a.fc.g_idx"][1:]}), keep, "does not fit 95 inputs"),
    ("gptq", lambda t: t.update({"a.fc.qzeros": t["a.fc.qzeros"][1:]}), keep, r"a\.fc\.qzeros is"),
    ("gptq", lambda t: t.pop("a.fc.g_idx"), lambda c: c.update(bits=10**9), "does not fit"),
    ("gptq", lambda t: t.pop("a.fc.g_idx"), lambda c: c.update(bits=0), "does not fit|whole"),
    ("gptq", lambda t: t.pop("a.fc.g_idx"), lambda c: c.update(group_size=1), "has groups 0 to 95"),
    ("awq", lambda t: t.pop("a.fc.qzeros"), keep, r"a\.fc\.qzeros is missing"),
    ("awq", lambda t: t.update({"a.fc.scales": t["a.fc.scales"][:, 8:]}), keep, r"a\.fc\.scales is"),
    ("awq", keep, lambda c: c.update(bits=8), "with 8"),
    ("bnb", lambda t: t.pop(f"{W}.absmax"), keep, r"absmax is missing"),
    ("bnb", lambda t: set_state(t, shape=[10**9, 10**9]), keep, "is no weight"),
    ("bnb", lambda t: set_state(t, shape="large"), keep, "no matrix"),
    ("bnb", lambda t: set_state(t, blocksize=0), keep, "blocksize 0"),
    ("bnb", lambda t: set_state(t, blocksize=10**15), keep, r"absmax is \[1\]"),
    ("bnb", lambda t: t.update({f"{W}.quant_map": torch.ones(15)}), keep, "quant_map is"),
    ("bnb", lambda t: t.update({f"{W}.quant_state.bitsandbytes__nf4": torch.zeros(9).byte()}), keep, "no JSON object"),
    ("nested", lambda t: t.pop(f"{W}.nested_absmax"), keep, "nested_absmax is missing"),
    ("nested", lambda t: set_state(t, nested_offset="NaN"), keep, "nested_offset"),
    ("weft", lambda t: t.pop("a.fc.weft.left"), keep, r"a\.fc\.weft\.left is missing"),
    ("weft", keep, lambda c: c["layers"].clear(), "does not have it among its layers"),
    ("weft", keep, lambda c: c["layers"]["a.fc"].update(shape=[64, 10**15]), "cannot hold"),
    ("weft", keep, lambda c: c["layers"]["a.fc"].update(shape=[64, 95]), "should be"),
    ("weft", keep, lambda c: c["layers"]["a.fc"].update(shape=[64]), "no matrix"),
    ("weft", keep, lambda c: c["layers"]["a.fc"].update(tensors=[]), "does not name its tensors"),
    ("weft", keep, lambda c: c["layers"]["a.fc"].update(form="lowrank"), "Did you mean low-rank"),
    ("weft", keep, lambda c: c["layers"]["a.fc"]["inner"].update(bits=0), "1 to 16 bits"),
    ("weft", keep, lambda c: c.update(quant_method="torchao"), "'torchao'.*It reads awq"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "tensors", "config", "message"), HOSTILE, ids=[f"{i} {h[0]}" for i, h in enumerate(HOSTILE)]
)
def test_damage_is_refused(kind: str, tensors: Any, config: Any, message: str, example: Callable[[str], Path]) -> None:
    folder = example(kind)
    read_all(folder)
    change(folder, tensors, config)
    with pytest.raises(CheckpointError, match=message):
        read_all(folder)


def test_a_configuration_that_is_no_object(example: Callable[[str], Path]) -> None:
    folder = example("awq")
    (folder / "config.json").write_text('{"quantization_config": ["awq"]}')
    with pytest.raises(CheckpointError, match="should be a JSON object"):
        weft.open(folder)


def test_packed_and_plain_of_one_name(example: Callable[[str], Path]) -> None:
    folder = example("awq")
    change(folder, lambda t: t.update({W: torch.zeros(64, 96)}), keep)
    with pytest.raises(CheckpointError, match=r"a\.fc\.weight packed, and plain too"):
        weft.open(folder)


def test_one_file_of_a_quantised_folder(example: Callable[[str], Path]) -> None:
    folder = example("pack")
    with weft.open(folder) as whole, weft.open(folder / "model.safetensors") as file:
        assert list(file) == list(whole) == [W, "norm.weight"]
        assert np.array_equal(file[W].numpy(), whole[W].numpy())
        assert "quantization_config" not in file.config
    state = load_file(folder / "model.safetensors")
    save_file({f"{W}_packed": state[f"{W}_packed"]}, folder / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"part\.safetensors: a\.fc\.weight_scale is missing"):
        weft.open(folder / "part.safetensors")


def test_settings_are_part_of_the_fingerprint(example: Callable[[str], Path]) -> None:
    folder = example("pack")
    with weft.open(folder) as opened:
        first = opened.fingerprint
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"ignore": ["lm_head"]', '"ignore": []'))
    with weft.open(folder) as opened:
        assert opened.fingerprint != first


def test_the_type_and_older_gptq_folders(example: Callable[[str], Path]) -> None:
    folder = example("gptq")
    expected = EXAMPLES["gptq"][1].dequantize()
    for text, kind in (
        ('{"torch_dtype": "bfloat16"}', "BF16"),
        ('{"text_config": {"dtype": "float16"}}', "F16"),
        ("{}", "F32"),
    ):
        (folder / "config.json").write_text(text)  # quantize_config.json says the rest
        with weft.open(folder) as opened:
            assert torch.equal(opened[W].torch(), expected)
            assert opened[W].natural_dtype.name == kind
            assert opened[W].dtype.name == "F32"
    (folder / "quantize_config.json").unlink()
    with weft.open(folder) as opened:
        assert "a.fc.qweight" in opened
        assert opened.packed == {}


def test_reads_from_anywhere_and_from_threads(example: Callable[[str], Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = EXAMPLES["pack"][1].dequantize().numpy().reshape(-1)
    with weft.open(example("pack")) as opened:
        tensor = opened[W]

        def read(start: int) -> np.ndarray:
            out = np.empty(100, np.float32)
            tensor.read_into(memoryview(out).cast("B"), 4 * start)
            return out

        starts = [0, 6044, 17, 3000, 6044] * 20
        with ThreadPoolExecutor(4) as pool:
            for start, values in zip(starts, pool.map(read, starts)):
                assert np.array_equal(values, expected[start : start + 100])
        with pytest.raises(CheckpointError, match="beyond its end"):
            read(6100)


def test_matrices_of_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.checkpoint import quantized

    monkeypatch.setattr(quantized, "_BLOCK", 1000)  # 128 rows
    made: dict[str, tuple[str, Packed]] = {
        "grid": ("pack-quantized", affine(4, 32, out=300, symmetric=False)),
        "permuted": ("gptq", Permuted(affine(4, 32, out=320), ORDER)),
        "blocks": ("float-quantized", minifloat("e4m3", (128, 128), out=300)),
        "tensor": ("float-quantized", minifloat("e4m3", (300, 96), out=300, columns=96)),
        "low blocks": ("float-quantized", minifloat("e4m3", (96, 96), out=300)),
        "table": ("bitsandbytes", lookup(torch.linspace(-1, 1, 16)[None], 64, out=300, nested=True)),
        "low rank": ("weft", LowRank(affine(4, 32, out=300), positive(300, 2), positive(2, 96))),
    }
    for kind, (name, packed) in made.items():
        folder = tmp_path / kind
        write_model(folder, name, {"a.fc": packed, "b.fc": copy.deepcopy(packed)}, {})
        expected = packed.dequantize().numpy().reshape(-1)
        with weft.open(folder) as opened:
            assert np.array_equal(opened["b.fc.weight"].numpy().reshape(-1), expected)
            tensor = opened[W]
            for start, count in ((0, 10), (12_280, 20), (20_000, 8_000), (5, 100), (expected.size - 3, 3), (7, 3)):
                out = np.empty(count, np.float32)
                tensor.read_into(memoryview(out).cast("B"), 4 * start)
                assert np.array_equal(out, expected[start : start + count])


def test_plain_models_do_not_load_torch(tmp_path: Path, llama_folder: Callable[..., Path]) -> None:
    folder = llama_folder(tmp_path / "m")
    code = "import sys, weft; weft.open(sys.argv[1]); print('torch' in sys.modules, 'weft.packed' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["False", "False"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, and three quantised ones of it."""
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    source = llama(root / "plain")

    def grid(layer: str, out: int, columns: int) -> Affine:
        return affine(4, 32, out=out, columns=columns, symmetric=False)

    packed_llama(source, root / "one", "pack-quantized", grid)
    packed_llama(source, root / "two", "gptq", grid)
    packed_llama(source, root / "own", "weft", lambda _, o, i: LowRank(grid("", o, i), positive(o, 2), positive(2, i)))
    return root


def test_commands_take_quantised_models(models: Path, tmp_path: Path) -> None:
    text = run("inspect", models / "one", "--quiet")
    assert "14 layers are packed in few bits" in text
    assert "model.layers.0.mlp.up_proj.weight" in text
    assert "weight_packed" not in text
    assert json.loads(run("inspect", models / "own", "--json", "--quiet"))["parameters"] == 90_432
    assert "identical" in run("diff", models / "one", models / "plain", "--quiet")
    run("merge", models / "one", models / "own", "--method", "linear", "-o", tmp_path / "merged", "--quiet")
    with weft.open(models / "one") as a, weft.open(models / "own") as b, weft.open(tmp_path / "merged") as made:
        assert list(made) == list(a)
        assert made.packed == {}
        assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
        for name in made:
            assert made[name].dtype.name == "BF16"
            mean = (a[name].torch().double() + b[name].torch().double()) / 2
            assert torch.equal(made[name].torch(), mean.float().bfloat16())
    run("convert", models / "two", "-o", tmp_path / "dense", "--quiet")
    assert not (tmp_path / "dense" / "quantize_config.json").exists()
    with weft.open(models / "two") as two, weft.open(tmp_path / "dense") as dense:
        assert all(torch.equal(dense[n].torch(), two[n].torch().bfloat16()) for n in two)


def test_adapters_are_baked_into_quantised_bases(models: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj"
    left, right = torch.randn(64, 4), torch.randn(4, 64)
    folder = tmp_path / "adapter"
    folder.mkdir()
    factors = {"lora_A.weight": right, "lora_B.weight": left}
    save_file({f"base_model.model.{name}.{n}": t for n, t in factors.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    run("bake", models / "one", "-a", folder, "-o", tmp_path / "baked", "--quiet")
    with weft.open(models / "one") as base, weft.open(tmp_path / "baked") as made:
        expected = base[f"{name}.weight"].torch() + 2 * left @ right
        torch.testing.assert_close(made[f"{name}.weight"].torch(), expected.bfloat16(), rtol=8e-3, atol=1e-3)
        assert torch.equal(made["lm_head.weight"].torch(), base["lm_head.weight"].torch())


def test_a_rewritten_quantised_model_is_plain(models: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from weft.quantize import RTN, quantize_model

    for kind in ("one", "two"):
        made = quantize_model(models / kind, tmp_path / kind, RTN(8, 0, "symmetric"), format="dense")
        assert "quantization_config" not in json.loads((made / "config.json").read_text())
        assert not (made / "quantize_config.json").exists()
        state = AutoModelForCausalLM.from_pretrained(made).state_dict()
        with weft.open(made) as opened, weft.open(models / kind) as before:
            for name in opened:
                assert opened[name].dtype.name == "BF16"
                assert torch.equal(state[name], opened[name].torch())
                torch.testing.assert_close(state[name].float(), before[name].torch().float(), rtol=0.02, atol=0.06)


def test_no_tensor_can_be_missing() -> None:
    seen: set[tuple[str, ...]] = set()
    for name, packed in cases():
        form = find_format(name)
        tensors = form.write("P", packed, torch.float16)
        key = (name, type(packed).__name__, *tensors)
        if key in seen:
            continue
        seen.add(key)
        config = form.config({"P": packed}, [])
        for gone in tensors:
            rest = {n: t for n, t in tensors.items() if n != gone}
            # an index that rises need not be there, and what only inputs need
            if gone.endswith(("g_idx", "input_scale", "input_global_scale", "activation_scale")) and name != "weft":
                made = form.read("P", rest.__getitem__, config)
                assert isinstance(packed, Permuted) or torch.equal(made.dequantize(), packed.dequantize())
            else:
                with pytest.raises(CheckpointError, match=r"P[.:]"):
                    form.read("P", rest.__getitem__, config)
