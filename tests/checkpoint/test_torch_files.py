"""Torch's files: nothing that they contain is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from weft.errors import CheckpointError


class Attack:
    """Leaves a mark if it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.5, -2.0]).bfloat16()}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_state_dicts(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(STATE, path)
    with weft.open(path) as checkpoint:
        assert list(checkpoint) == list(STATE)
        for name, expected in STATE.items():
            assert torch.equal(checkpoint[name].torch(), expected)


@pytest.mark.parametrize("under", ["state_dict", "model_state_dict", "model", "module", "ema_state_dict"])
def test_nested_state_dicts(under: str, tmp_path: Path) -> None:
    torch.save({"epoch": 3, under: STATE, "name": "run", "step": torch.tensor(7)}, tmp_path / "x.pt")
    assert list(weft.open(tmp_path / "x.pt")) == list(STATE)


def test_tied_weights_are_aliases(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(4, 3)
    torch.save({"embed": table, "head": table, "part": table[1:], "flat": table.view(-1)}, tmp_path / "x.bin")
    with weft.open(tmp_path / "x.bin") as checkpoint:
        assert checkpoint.aliases == {"head": "embed"}
        assert torch.equal(checkpoint["part"].torch(), table[1:])


def test_views_and_strides(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(4, 3)
    torch.save(
        {"t": table.t(), "step": table[::2], "wide": table[:1].expand(5, 3), "scalar": table[1, 1]}, tmp_path / "x.pt"
    )
    with weft.open(tmp_path / "x.pt") as checkpoint:
        assert torch.equal(checkpoint["t"].torch(), table.t())
        assert torch.equal(checkpoint["step"].torch(), table[::2])
        assert torch.equal(checkpoint["wide"].torch(), table[:1].expand(5, 3))
        assert checkpoint["scalar"].torch() == 4


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("place", ["top", "beside tensors", "nested", "key"])
@pytest.mark.filterwarnings("ignore:.*old format.*")
def test_code_is_refused_and_not_run(place: str, old_format: bool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    attack = Attack(mark)
    value = {
        "top": attack,
        "beside tensors": {**STATE, "x": attack},
        "nested": {"state_dict": STATE, "hooks": [{"deep": (attack,)}]},
        "key": {(1, attack): STATE["a.weight"]},
    }[place]
    torch.save(value, tmp_path / "model.bin", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=r"holds more than tensors.*refused.*safetensors"):
        weft.open(tmp_path / "model.bin")
    assert not mark.exists()
    torch.load(tmp_path / "model.bin", weights_only=False)
    assert mark.exists(), "the attack works where it is let in, or the test proves nothing"


def test_plain_pickles(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Attack(tmp_path / "mark")))
    (tmp_path / "array.pt").write_bytes(pickle.dumps({"a": np.zeros(3)}))
    for name in ("bad.pt", "array.pt"):
        with pytest.raises(CheckpointError):
            weft.open(tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_whole_modules_are_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="re-save only the state dict"):
        weft.open(tmp_path / "model.pt")


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 0.5, 0.9, -1])
def test_truncated_files(keep: float, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "model.bin")
    data = (tmp_path / "model.bin").read_bytes()
    count = len(data) + int(keep) if keep < 0 else int(keep * len(data)) if 0 < keep < 1 else int(keep)
    (tmp_path / "model.bin").write_bytes(data[:count])
    with pytest.raises(CheckpointError, match=r"model\.bin"):
        weft.open(tmp_path / "model.bin")


def test_damaged_archives(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(tmp_path / "less.pt", "w") as less:
        for item in whole.infolist():
            if not item.filename.endswith("data/0"):
                less.writestr(item, whole.read(item))
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for name in ("less.pt", "noise.pt", "text.pt"):
        with pytest.raises(CheckpointError, match=name):
            weft.open(tmp_path / name)


def test_the_old_format_is_read_whole_with_a_warning(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.warns(UserWarning, match="old format.*weft convert"):
        checkpoint = weft.open(tmp_path / "old.bin")
    assert torch.equal(checkpoint["a.bias"].torch(), STATE["a.bias"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "expected a state dict.*found list"),
        (torch.ones(2), "expected a state dict.*found Tensor"),
        ({"lr": 0.1, "step": 3}, "holds no tensors.*'lr', 'step'"),
        ({}, "holds no tensors"),
        ({"model": {"lr": 3}}, "holds no tensors"),
    ],
)
def test_files_without_weights(value: Any, message: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        weft.open(tmp_path / "x.pt")


def sharded(folder: Path) -> Path:
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, folder / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "training_args.bin").write_bytes(b"not weights")
    return folder


def test_sharded_folders(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    with weft.open(folder) as checkpoint:
        assert list(checkpoint) == ["a", "b"]
        assert (checkpoint.name, checkpoint.config["model_type"], checkpoint.folder) == ("m", "tiny", folder)
    assert len(weft.open(folder / "pytorch_model.bin.index.json")) == 2
    (folder / "pytorch_model.bin.index.json").unlink()
    assert len(weft.open(folder)) == 2


def test_incomplete_folders(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    torch.save({"c": torch.zeros(3)}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"lists 'b' in 'pytorch_model-00002.*different saves"):
        weft.open(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
            weft.open(folder)
        (folder / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    torch.save({"a": torch.zeros(3)}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match="'a' is in two files"):
        weft.open(folder)


def test_safetensors_go_before_torch_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = sharded(tmp_path / "m")
    save_file({"s": torch.ones(1)}, folder / "model.safetensors")
    assert list(weft.open(folder)) == ["s"]
