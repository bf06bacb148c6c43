"""Folders, files and state dicts: what is opened, how it reads back, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from weft.checkpoint.dtypes import DTYPES, dtype_of
from weft.checkpoint.files import LocalFile
from weft.checkpoint.folder import natural_key
from weft.errors import CheckpointError, MissingTensorError


def write(folder: Path, shards: dict[str, dict[str, Any]], index: bool = True, config: bool = True) -> Path:
    """A Hugging Face folder with the given files."""
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    if index:
        weight_map = {n: shard for shard, tensors in shards.items() for n in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config:
        (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def tensors(*names: str, value: float = 1.0) -> dict[str, torch.Tensor]:
    return {n: torch.full((2, 3), value + i) for i, n in enumerate(names)}


TWO = {"model-00001-of-00002.safetensors": tensors("b.0", "b.10"), "model-00002-of-00002.safetensors": tensors("b.9")}


def test_a_sharded_folder_is_one_checkpoint_in_natural_order(tmp_path: Path) -> None:
    with weft.open(write(tmp_path / "m", TWO)) as checkpoint:
        assert list(checkpoint) == ["b.0", "b.9", "b.10"]
        assert checkpoint.config == {"model_type": "tiny"}
        assert (checkpoint.name, checkpoint.folder) == ("m", tmp_path / "m")
        assert (checkpoint.parameters, checkpoint.nbytes, len(checkpoint)) == (18, 72, 3)
        assert torch.equal(checkpoint["b.10"].torch(), torch.full((2, 3), 2.0))
        assert "b.1" not in checkpoint
        with pytest.raises(MissingTensorError, match=r"no tensor 'b\.11'.*Did you mean b\.1"):
            checkpoint["b.11"]
    with pytest.raises(CheckpointError, match="reading failed"):
        checkpoint["b.0"].numpy()


def test_one_file_and_the_index_itself(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TWO)
    assert list(weft.open(folder / "model-00002-of-00002.safetensors")) == ["b.9"]
    assert len(weft.open(folder / "model.safetensors.index.json")) == 3
    assert len(weft.open(str(folder) + "/")) == 3
    os.chdir(folder)
    assert weft.open(".").name == "m"


def test_strays_are_left_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TWO)
    save_file(tensors("b.0", "stray", value=9), folder / "consolidated.safetensors")
    save_file(
        {**TWO["model-00002-of-00002.safetensors"], **tensors("b.0", value=9)},
        folder / "model-00002-of-00002.safetensors",
    )
    with weft.open(folder) as checkpoint:
        assert list(checkpoint) == ["b.0", "b.9", "b.10"]
        assert checkpoint["b.0"].numpy()[0, 0] == 1.0, "the index decides which copy counts"


def test_the_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TWO)
    save_file(tensors("only"), folder / "model.safetensors")
    assert list(weft.open(folder)) == ["only"]


def test_an_index_of_another_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TWO)
    (folder / "model.safetensors.index.json").rename(folder / "diffusion.safetensors.index.json")
    assert len(weft.open(folder)) == 3


def test_files_without_an_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"x.safetensors": tensors("a"), "y.safetensors": tensors("b")}, index=False)
    assert list(weft.open(folder)) == ["a", "b"]
    save_file(tensors("a"), folder / "z.safetensors")
    with pytest.raises(CheckpointError, match="'a' is in two files and no index"):
        weft.open(folder)


@pytest.mark.parametrize("index", [True, False])
def test_missing_shards_are_named(index: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TWO, index=index)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors is missing"):
        weft.open(folder)


def test_an_index_of_another_save_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TWO)
    save_file(tensors("b.8"), folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"lists 'b\.9' in 'model-00002.*different saves"):
        weft.open(folder)


HOSTILE_INDEX: dict[str, tuple[Any, str]] = {
    "parent": ({"weight_map": {"a": "../secret.safetensors"}}, "not a plain file name"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "not a plain file name"),
    "backslash": ({"weight_map": {"a": "..\\secret"}}, "not a plain file name"),
    "dots": ({"weight_map": {"a": ".."}}, "not a plain file name"),
    "empty name": ({"weight_map": {"a": ""}}, "not a plain file name"),
    "zero byte": ({"weight_map": {"a": "x\0y"}}, "not a plain file name"),
    "half a surrogate": ({"weight_map": {"a": "\ud800"}}, "not a plain file name"),
    "endless name": ({"weight_map": {"a": "x" * 5000}}, "not a plain file name"),
    "number": ({"weight_map": {"a": 3}}, "not a plain file name"),
    "list": ({"weight_map": ["a"]}, "needs a non-empty weight_map"),
    "nothing": ({}, "needs a non-empty weight_map"),
    "empty": ({"weight_map": {}}, "needs a non-empty weight_map"),
    "not an object": ([1], "expected a JSON object"),
    "missing file": ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
    "not weights": ({"weight_map": {"a": "config.json"}}, "header"),
}


@pytest.mark.parametrize("case", HOSTILE_INDEX)
def test_hostile_indexes(case: str, tmp_path: Path) -> None:
    save_file(tensors("a"), tmp_path / "secret.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}" * 20)
    index, message = HOSTILE_INDEX[case]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message) as caught:
        weft.open(folder)
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00", "\ufeff{}"])
def test_damaged_json(text: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TWO)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not readable as JSON"):
        weft.open(folder)


def test_things_that_are_no_files(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "model.safetensors").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        weft.open(folder)
    (folder / "model.safetensors").rmdir()
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        weft.open(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the name given is empty"),
        ("  ", "the name given is empty"),
        ("nothing", "no such file or folder, and not a Hub id"),
        ("modle", "Did you mean model"),
        ("~nobody-of-this-name/x", "no such file"),
        ("x\0y", "no such file"),
        ("x" * 5000, "no such file"),
        ("a/b/c", "no such file"),
        ("+", "no such file"),
        ("model+", "no such file"),
        ("model+gone", "no such file"),
        ("notes.txt", "not a kind of file"),
        ("hollow", "holds no weights.*subfolder 'inner'"),
        ("void", "holds no weights"),
        ("adapter", r"has adapter_config\.json but no adapter_model\.safetensors"),
        ("model+model", "is not an adapter"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model", TWO)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "void").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "hollow" / "inner").mkdir(parents=True)
    (tmp_path / "hollow" / "inner" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        weft.open(name)


def test_a_model_beside_an_adapters_configuration_is_the_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"model.safetensors": tensors("a")}, index=False)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert list(weft.open(folder)) == ["a"]


def test_fingerprints_change_with_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", TWO)
    first = weft.open(folder).fingerprint
    assert weft.open(folder).fingerprint == first
    os.utime(folder / "model-00001-of-00002.safetensors", ns=(1, 1))
    assert weft.open(folder).fingerprint != first


def test_failing_to_open_leaves_no_file_open(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        LocalFile(tmp_path / "nothing")
    folder = write(tmp_path / "m", TWO)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"damaged")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(CheckpointError):
            weft.open(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_shrink_while_they_are_open(tmp_path: Path) -> None:
    save_file(tensors("a", "b"), tmp_path / "m.safetensors")
    with weft.open(tmp_path / "m.safetensors") as checkpoint:
        os.truncate(tmp_path / "m.safetensors", (tmp_path / "m.safetensors").stat().st_size - 1)
        with pytest.raises(CheckpointError, match="truncated while it was being read"):
            checkpoint["b"].numpy()


TORCH_TYPES = [d for d in DTYPES.values() if d.torch and hasattr(torch, d.torch)]


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0,), (2, 0, 3), (1, 1, 1, 2)], ids=str)
def test_every_type_goes_both_ways(dtype: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    """The same bytes as safetensors.torch, from a file and from memory, with NaN payloads and all."""
    if dtype.bits < 8 and (not shape or 0 in shape):
        pytest.skip("safetensors.torch does not write such tensors of pairs")
    width = dtype.bits // 8 or 1
    random = np.random.default_rng(0).integers(
        0, 2 if dtype.name == "BOOL" else 256, int(np.prod(shape)) * width, np.uint8
    )
    raw = torch.from_numpy(random)
    tensor = (
        raw.view(getattr(torch, dtype.torch)).reshape(shape)
        if raw.numel()
        else torch.empty(shape, dtype=getattr(torch, dtype.torch))
    )
    path = tmp_path / "x.safetensors"
    save_file({"x": tensor}, path)

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        bits = [t.reshape(-1).view(torch.uint8) if t.numel() else t.reshape(-1) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and (not a.numel() or torch.equal(*bits))

    with weft.open(path) as opened:
        for lazy in (opened["x"], weft.open({"x": tensor})["x"]):
            assert lazy.dtype is dtype
            assert same(lazy.torch(), tensor)
            assert same(lazy.torch(), load_file(path)["x"])
            assert lazy.nbytes == random.nbytes
            if dtype.floating:
                with np.errstate(invalid="ignore", over="ignore"):
                    np.testing.assert_array_equal(lazy.numpy().astype(np.float32), tensor.to(torch.float32).numpy())
            elif dtype.bits >= 8 and dtype.name != "F8_E8M0":
                np.testing.assert_array_equal(lazy.numpy(), tensor.numpy())


def test_state_dicts_of_torch_and_numpy() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    checkpoint = weft.open({"w": weight, "t": weight.t(), "n": np.arange(3, dtype=">f4"), "s": torch.tensor(2.5)})
    assert torch.equal(checkpoint["w"].torch(), weight)
    assert torch.equal(checkpoint["t"].torch(), weight.t())
    np.testing.assert_array_equal(checkpoint["n"].numpy(), [0, 1, 2])
    assert checkpoint["s"].numpy() == np.float32(2.5)
    assert checkpoint.aliases == {}
    conjugate = torch.tensor([1 + 2j]).conj()
    assert torch.equal(weft.open({"c": conjugate})["c"].torch(), conjugate.resolve_conj())


def test_tied_tensors_are_aliases_and_views_are_not() -> None:
    table = torch.arange(12.0).reshape(4, 3)
    checkpoint = weft.open({"a": table, "b": table, "c": table[1:], "d": table.clone(), "e": table.view(3, 4)})
    assert checkpoint.aliases == {"b": "a"}
    assert checkpoint.parameters == 4 * 12 - 3
    array = np.ones((2, 2), np.float32)
    assert weft.open({"a": array, "b": array, "c": array.T, "d": array.view(np.int32)}).aliases == {"b": "a"}
    assert weft.open({"a": torch.empty(0), "b": torch.empty(0)}).aliases == {}


BAD_VALUES: dict[str, tuple[Any, str]] = {
    "number": (3, "expected a torch or numpy tensor, found int"),
    "none": (None, "found NoneType"),
    "meta": (torch.empty(3, device="meta"), "without plain bytes .meta"),
    "sparse": (torch.eye(3).to_sparse(), "without plain bytes .*sparse"),
    "text": (np.array(["a"]), "numpy type <U1"),
    "objects": (np.array([None]), "numpy type object"),
    "long double": (np.zeros(2, np.longdouble), "numpy type float128"),
    "wide complex": (torch.zeros(2, dtype=torch.complex128), "Unknown dtype 'torch.complex128'"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_without_bytes_are_refused_by_name(case: str) -> None:
    value, message = BAD_VALUES[case]
    with pytest.raises(CheckpointError, match=f"'the.name': .*{message}"):
        weft.open({"the.name": value})


def test_dtype_names() -> None:
    for row in DTYPES.values():
        for name in filter(None, (row.name, row.name.lower(), row.torch, f"torch.{row.torch}")):
            if name != "torch.":
                assert dtype_of(name) is row
    with pytest.raises(CheckpointError, match=r"Unknown dtype 'fp17'\. Did you mean fp16"):
        dtype_of("fp17")


def test_natural_order() -> None:
    names = ["h.10.w", "h.9.w", "h.9", "h", "a.b", "h." + "9" * 5000 + ".w", "h.٣.w"]
    assert sorted(names, key=natural_key)[:5] == ["a.b", "h", "h.9", "h.9.w", "h.10.w"]
