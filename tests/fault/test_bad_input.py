"""Bad input ends in one clear line: no traceback, no output folder, no work folder."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from weft.cli.app import app
from weft.errors import WeftError


def header(tensors: dict[str, object]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape if shape is not None else [(end - start) // 4], "data_offsets": [start, end]}


def put(folder: Path, data: bytes, name: str = "model.safetensors") -> None:
    (folder / name).write_bytes(data)


class Exploit:
    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("exploited", "w"))


def truncated(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    put(folder, whole[: len(whole) // 2])


def tiny(folder: Path) -> None:
    put(folder, b"\x01\x02")


def overlapping(folder: Path) -> None:
    put(folder, header({"a": entry(0, 8), "b": entry(4, 12)}) + bytes(12))


def out_of_range(folder: Path) -> None:
    put(folder, header({"a": entry(0, 8), "b": entry(8, 1 << 40, [2])}) + bytes(16))


def absurd_shape(folder: Path) -> None:
    put(folder, header({"a": entry(0, 8, [1 << 40, 1 << 40])}) + bytes(8))


def absurd_header(folder: Path) -> None:
    put(folder, struct.pack("<Q", 1 << 60) + b"{}")


def not_json(folder: Path) -> None:
    put(folder, struct.pack("<Q", 4) + b"\xff\xfe{}")


def deep_json(folder: Path) -> None:
    text = b"[" * 200_000
    put(folder, struct.pack("<Q", len(text)) + text)


def duplicate_names(folder: Path) -> None:
    text = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    put(folder, struct.pack("<Q", len(text)) + text + bytes(4))


def unknown_dtype(folder: Path) -> None:
    put(folder, header({"a": entry(0, 4, [1], "F33")}) + bytes(4))


def negative_offset(folder: Path) -> None:
    put(folder, header({"a": entry(-4, 0, [1])}) + bytes(4))


def trailing_bytes(folder: Path) -> None:
    put(folder, (folder / "model.safetensors").read_bytes() + b"more")


def index_leaves_the_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../../../etc/passwd"}}
    put(folder, json.dumps(index).encode(), "model.safetensors.index.json")


def index_names_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    put(folder, json.dumps(index).encode(), "model.safetensors.index.json")


def index_is_not_json(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    put(folder, b"{", "model.safetensors.index.json")


def pickle_with_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    put(folder, pickle.dumps({"a": Exploit()}), "pytorch_model.bin")


def pickle_truncated(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    put(folder, b"PK\x03\x04 not a zip", "pytorch_model.bin")


def config_is_not_json(folder: Path) -> None:
    put(folder, b"[1, 2", "config.json")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(str(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(folder / "model.safetensors"))


def nan(folder: Path) -> None:
    rewrite(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((0, 0), np.nan))


def infinite(folder: Path) -> None:
    rewrite(folder, lambda t: t["lm_head.weight"].__setitem__((0, 0), np.inf))


def missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))


def wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda t: t.__setitem__("lm_head.weight", np.zeros((3, 3), np.float32)))


DAMAGE = {
    truncated: "truncated", tiny: "too short", overlapping: "overlaps", out_of_range: "1099511627776", absurd_shape: "larger than any array",
    absurd_header: "claims", not_json: "not valid JSON", deep_json: "not valid JSON", duplicate_names: "twice",
    unknown_dtype: "unknown dtype", negative_offset: "negative", trailing_bytes: "follow the last tensor",
    index_leaves_the_folder: "not a plain file name", index_names_a_missing_shard: "missing", index_is_not_json: "JSON",
    pickle_with_code: "could run code", pickle_truncated: "torch file", config_is_not_json: "JSON", no_weights: "no weights",
    nan: "NaN", infinite: "infinity", missing_tensor: "has no tensor", wrong_shape: "shape",
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path, llama_folder: Callable[..., Path]) -> list[Path]:
    return [llama_folder(tmp_path / f"m{i}", seed=i) for i in range(3)]


def fails(arguments: list[object], folder: Path, *words: str) -> str:
    """Run in this process; the message of the one line that it must end in."""
    before = {p.name for p in folder.iterdir()}
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code != 0
    assert isinstance(result.exception, WeftError), repr(result.exception)
    message = str(result.exception)
    for word in words:
        assert word in message, message
    assert {p.name for p in folder.iterdir()} == before, "something was left behind"
    return message


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_damaged_model(damage: Callable[[Path], None], method: str, models: list[Path], tmp_path: Path) -> None:
    damage(models[1])
    base = ["--base", models[0]] if method == "ties" else [models[0]]
    fails(["merge", models[1], models[2], *base, "--method", method, "-o", tmp_path / "out"], tmp_path, DAMAGE[damage])
    assert not Path("exploited").exists()
    assert not (tmp_path / "exploited").exists()


RECIPES = {
    "steps: [{method: tis, models: [m0, m1]}]": "Did you mean ties",
    "steps: [{method: ties, model: [m0, m1]}]": "Did you mean models",
    "steps: [{method: ties, models: [m0, m1], parameters: {densty: 1}}]": "Did you mean density",
    "steps: [{method: ties, models: [m0, m1], base: m2, parameters: {density: 7}}]": "between 0 and 1",
    "steps: [{method: linear, models: [m0, m1]}]\noutput: {dtype: bfloat}": "bfloat16",
    "steps: [{method: linear, models: ['@first', m1]}]": "@first",
    "steps: [{method: linear, models: [m0, nowhere]}]": "no such file or folder",
    "steps: []": "at least 1",
    "steps: !!python/object/apply:os.system ['true']": "not a plain YAML file",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nsteps: [*e,*e,*e,*e,*e,*e,*e,*e]": "expand",
    "steps: &s [*s]": "",
    "just text": "mapping",
    "- 1": "mapping",
    "steps: [{method: linear, models: [m0, m1]": "YAML",
}


@pytest.mark.parametrize("text", RECIPES, ids=range(len(RECIPES)))
def test_bad_recipe(text: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    fails(["run", "recipe.yaml", "-o", "out"], tmp_path, RECIPES[text])


def test_one_line_and_exit_code_in_a_process(
    models: list[Path], tmp_path: Path, weft_command: Callable[..., object]
) -> None:
    truncated(models[1])
    done = weft_command("merge", models[0], models[1], "-o", tmp_path / "out", "--json")
    assert done.returncode == 3  # type: ignore[attr-defined]
    assert "Traceback" not in done.stderr  # type: ignore[attr-defined]
    assert done.stderr.startswith("error: ")  # type: ignore[attr-defined]
    assert json.loads(done.stdout)["error"] == "CheckpointError"  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists()


def test_the_output_may_not_be_an_input(models: list[Path], tmp_path: Path) -> None:
    fails(["merge", models[0], models[1], "-o", models[0], "--force"], tmp_path, "input")
    fails(["merge", models[0], models[1], "-o", tmp_path, "--force"], tmp_path, "input")


def test_force_replaces_only_what_weft_made(models: list[Path], tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    fails(["merge", models[0], models[1], "-o", precious], tmp_path, "exists already")
    fails(["merge", models[0], models[1], "-o", precious, "--force"], tmp_path, "not made by weft")
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_allow_non_finite(models: list[Path], tmp_path: Path) -> None:
    nan(models[1])
    result = CliRunner().invoke(
        app, ["merge", str(models[0]), str(models[1]), "-o", str(tmp_path / "out"), "--allow-non-finite"]
    )
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "out" / "model.safetensors").exists()
