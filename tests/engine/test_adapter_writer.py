"""Adapter folders appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import weft
from weft.checkpoint.dtypes import DTYPES
from weft.engine.adapter_writer import AdapterWriter, plain_config
from weft.engine.journal import WorkFolder
from weft.errors import OutputError

F32 = DTYPES["F32"]


def fill(writer: AdapterWriter) -> None:
    writer.add("b", np.arange(6, dtype=np.float32).reshape(2, 3), F32)
    writer.add("a", np.float32(2.5).reshape(()), F32)
    writer.add("c", np.arange(4, dtype=np.uint16), DTYPES["BF16"], (2, 2))
    writer.add("none", np.empty((0, 3), np.float32), F32)


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    with AdapterWriter(tmp_path / "out") as writer:
        fill(writer)
        assert not (tmp_path / "out").exists()
        writer.publish({"peft_type": "LORA"}, {"made": "here"})
        assert writer.published
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "weft.json",
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    read = weft.open(tmp_path / "out" / "adapter_model.safetensors")
    assert {n: t.shape for n, t in read.items()} == {"a": (), "b": (2, 3), "c": (2, 2), "none": (0, 3)}
    assert np.array_equal(read["b"].numpy(), np.arange(6).reshape(2, 3))
    assert np.array_equal(read["c"].bits().reshape(-1), np.arange(4))
    assert read["a"].numpy() == np.float32(2.5)
    assert json.loads((tmp_path / "out" / "weft.json").read_text()) == {"made": "here"}
    del read
    one = {"x": np.ones(3, np.float32)}
    with AdapterWriter(tmp_path / "out", force=True) as writer:
        writer.add("x", one["x"], F32)
        writer.publish({}, {})
    assert np.array_equal(load_file(tmp_path / "out" / "adapter_model.safetensors")["x"], one["x"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", ["error", "forgotten"])
def test_what_is_not_published_leaves_nothing(how: str, tmp_path: Path) -> None:
    def work() -> None:
        with AdapterWriter(tmp_path / "out") as writer:
            fill(writer)
            if how == "error":
                raise RuntimeError("stop")

    if how == "error":
        with pytest.raises(RuntimeError, match="stop"):
            work()
    else:
        work()
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_output(tmp_path: Path) -> None:
    with AdapterWriter(tmp_path / "out") as first:
        with pytest.raises(OutputError, match="another run"), AdapterWriter(tmp_path / "out"):
            pass
        fill(first)
        first.publish({}, {})
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_unfinished_runs_are_kept_unless_forced(tmp_path: Path) -> None:
    other = WorkFolder(tmp_path / "out")
    other.acquire()
    other.begin({"recipe": "merge"})
    other.release()
    with pytest.raises(OutputError, match="unfinished run"), AdapterWriter(tmp_path / "out"):
        pass
    assert other.read()[0] == {"recipe": "merge"}
    with AdapterWriter(tmp_path / "out", force=True) as writer:
        fill(writer)
        writer.publish({}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_writer_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "files").mkdir(parents=True)
    (tmp_path / "out.partial" / "files" / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / "out.partial" / "spool").write_bytes(b"half")
    with AdapterWriter(tmp_path / "out") as writer:
        fill(writer)
        writer.publish({}, {})
    assert len(weft.open(tmp_path / "out" / "adapter_model.safetensors")) == 4


def test_names_are_added_once(tmp_path: Path) -> None:
    with AdapterWriter(tmp_path / "out") as writer:
        fill(writer)
        with pytest.raises(ValueError, match="a was added before"):
            writer.add("a", np.zeros(1, np.float32), F32)


@pytest.mark.parametrize(
    ("ranks", "options", "expected"),
    [
        ({}, {}, {"r": 1, "target_modules": "dummy-target-modules", "rank_pattern": {}}),
        ({"a": 3}, {"alpha": 5.0}, {"r": 3, "lora_alpha": 5.0, "alpha_pattern": {}}),
        ({"a": 3, "b.c": 2, "d": 3}, {"alpha": 5.0}, {"r": 3, "rank_pattern": {r"^b\.c": 2}, "alpha_pattern": {}}),
        ({"a": 3, "b.c": 2, "d": 3}, {}, {"lora_alpha": 3, "alpha_pattern": {r"^b\.c": 2}}),
    ],
)
def test_configurations(ranks: dict[str, int], options: dict[str, Any], expected: dict[str, Any]) -> None:
    config = plain_config(ranks, **options)
    assert {k: config[k] for k in expected} == expected
