"""save_tensors: read back bit for bit by weft and by the reference library, complete or not at all."""

import os

import numpy as np
import pytest
import torch
from safetensors import safe_open

import weft
from weft.checkpoint.save import save_tensors
from weft.errors import CheckpointError, OutputError

TENSORS = {
    "bfloat16": torch.randn(3, 5).to(torch.bfloat16),
    "float16": torch.randn(7).to(torch.float16),
    "float8": torch.randn(3).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "counter": torch.tensor([1, 2**40]),
    "mask": torch.tensor([True, False, True]),
    "double": torch.randn(2, dtype=torch.float64),
}


def test_round_trip(tmp_path):
    path = tmp_path / "some.safetensors"
    save_tensors(path, TENSORS, {"key": "välue"})
    with weft.open(path) as file:
        assert file.metadata == {"format": "pt", "key": "välue"}
        for name, tensor in TENSORS.items():
            found = file[name].torch()
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert file[name].bits().tobytes() == bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(TENSORS)
        assert torch.equal(file.get_tensor("transposed"), TENSORS["transposed"])
    assert os.listdir(tmp_path) == ["some.safetensors"]


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "some.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        save_tensors(path, TENSORS, {})
    assert path.read_bytes() == b"mine"


def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save_tensors(tmp_path / "some.safetensors", TENSORS, {})
    with pytest.raises(CheckpointError, match="'x'"):
        save_tensors(tmp_path / "some.safetensors", {"x": np.array(["text"])}, {})
    assert os.listdir(tmp_path) == []
