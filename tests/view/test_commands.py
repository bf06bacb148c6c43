"""What ``weft inspect`` and ``weft diff`` hand back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weft.engine.progress import Progress
from weft.errors import CheckpointError, OutputError, RecipeError
from weft.view import comparison, inspection
from weft.view.commands import diff_command, inspect_command


def lines_of(text: str, first_word: str) -> list[str]:
    """The table that starts with a heading, without it."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() and line.split()[0] == first_word)
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return lines[start + 1 : end]


@pytest.fixture
def troubled() -> dict[str, Any]:
    random = np.random.default_rng(0)
    state: dict[str, Any] = {f"h.{i}.{k}.weight": random.standard_normal((6, 5)) for i in range(3) for k in "qv"}
    state = {name: torch.tensor(value, dtype=torch.bfloat16) for name, value in state.items()}
    state["h.1.q.weight"][0, 0] = np.nan
    state["h.2.v.weight"][:] = 0
    state["h.0.v.weight"] = state["h.0.q.weight"].clone()
    state["ids"] = torch.arange(7)
    state["scalar"] = torch.tensor(2.0)
    state["empty"] = torch.zeros(0, 3)
    return state


def test_inspect_tells_totals_and_trouble(troubled: dict[str, Any]) -> None:
    text = inspect_command(troubled)
    assert text.splitlines()[0] == "state dict: 188 parameters in 9 tensors, 420 B (BF16 360 B, I64 56 B, F32 4 B)"
    assert "NaN or infinity in 1 of 9 tensors, most in h.1.q.weight: 1 NaN, 0 infinite." in text
    assert "All elements are equal in h.2.v.weight." in text
    assert "The same bytes are stored under h.0.q.weight, h.0.v.weight." in text
    assert [line.split()[0] for line in lines_of(text, "layer")] == ["0", "1", "2", "outside"]
    assert [line.split()[0] for line in lines_of(text, "tensor")] == list(troubled)


def test_inspect_sorts_and_limits(troubled: dict[str, Any]) -> None:
    worst = [line.split()[0] for line in lines_of(inspect_command(troubled, sort="worst", limit=3), "tensor")]
    assert worst[:2] == ["h.1.q.weight", "h.2.v.weight"]
    assert worst[3:] == ["…"]
    names = [line.split()[0] for line in lines_of(inspect_command(troubled, sort="name"), "tensor")]
    assert names == sorted(troubled)
    many = {f"w{i}": np.zeros(2, np.float32) for i in range(50)}
    assert "… 10 more; --limit 0 shows all" in inspect_command(many)
    assert "more" not in inspect_command(many, limit=0)


@pytest.mark.parametrize("order", inspection.ORDERS)
def test_every_order_of_inspect_takes_any_tensor(order: str, troubled: dict[str, Any]) -> None:
    text = inspect_command(troubled, sort=order, limit=0, spectrum=True)
    assert len(lines_of(text, "tensor")) == len(troubled)


@pytest.mark.parametrize("order", comparison.ORDERS)
def test_every_order_of_diff_takes_any_tensor(order: str, troubled: dict[str, Any]) -> None:
    other = {**troubled, "h.2.v.weight": troubled["h.0.q.weight"]}
    text = diff_command(troubled, other, sort=order, limit=0)
    rows = lines_of(text, "tensor")
    assert len(rows) == len(troubled)
    if order == "change":
        assert rows[0].startswith("h.2.v.weight")
        assert "All zero in state dict, so without a relative change: h.2.v.weight." in text


def test_orders_are_what_they_say() -> None:
    state = {"a": np.float32([1, -1, 0]), "b": np.float32([5, 5.5, 7]), "c": np.float32([0.1, 0, 0])}
    report = json.loads(inspect_command(state, sort="rms", json=True))
    assert [row["name"] for row in report["tensors"]] == ["b", "a", "c"]
    report = json.loads(inspect_command(state, sort="zeros", json=True, limit=2))
    assert [row["name"] for row in report["tensors"]] == ["c", "a"]
    changed = {"a": -state["a"], "b": state["b"], "c": state["c"] * 1.5}
    report = json.loads(diff_command(state, changed, json=True))
    assert [row["name"] for row in report["tensors"]] == ["a", "c", "b"]
    report = json.loads(diff_command(state, changed, json=True, sort="largest"))
    assert [row["name"] for row in report["tensors"]] == ["a", "c", "b"]


def test_diff_tells_what_does_not_match() -> None:
    a = {
        "x": np.ones(3, np.float32),
        "y": np.ones(2, np.float32),
        "z": np.ones(2, np.float32),
        "t": np.ones(2, np.float32),
    }
    b = {
        "x": np.ones(3, np.float32),
        "y": np.ones(4, np.float32),
        "n": np.ones(2, np.float32),
        "t": np.ones(2, np.float16),
    }
    text = diff_command(a, b)
    assert "Only in state dict: z." in text
    assert "Only in state dict: n." in text
    assert "left out: y (F32 [2] against F32 [4])." in text
    assert "1 tensor stored in other types (F32 against F16), compared by value." in text
    assert "All compared tensors are identical." in text


def test_diff_of_nothing_comparable() -> None:
    text = diff_command({"w": np.ones(3, np.float32)}, {"w": np.ones(4, np.float32)})
    assert "compared 0 tensors" in text
    assert "relative change –" in text


def test_json_holds_null_and_never_nan(troubled: dict[str, Any]) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    troubled["all_nan"] = torch.full((2, 2), np.nan)
    for text in (inspect_command(troubled, json=True, spectrum=True), diff_command(troubled, troubled, json=True)):
        report = json.loads(text, parse_constant=refuse)
        row = next(r for r in report["tensors"] if r["name"] == "all_nan")
        assert row.get("rms", row.get("relative_change")) is None


def test_folders_in_any_number_of_threads(llama_folder: Any, tmp_path: Path) -> None:
    a, b = llama_folder(tmp_path / "a"), llama_folder(tmp_path / "b", seed=1)
    assert inspect_command(a, threads=1) == inspect_command(str(a), threads=3)
    assert diff_command(a, b, threads=1) == diff_command(str(a), str(b), threads=3)
    assert diff_command(a, b).startswith("a (a) against b (b)\n")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_tables_fit_the_terminal(width: int, llama_folder: Any, tmp_path: Path) -> None:
    a, b = llama_folder(tmp_path / "a"), llama_folder(tmp_path / "b", seed=1)
    for text, head in ((inspect_command(a, width=width, spectrum=True), 1), (diff_command(a, b, width=width), 2)):
        assert max(map(len, text.splitlines()[head:])) <= width


def test_progress_is_told(llama_folder: Any, tmp_path: Path) -> None:
    class Count(Progress):
        started, done, finished = 0, 0, False

        def start(self, label: str, tensors: int, nbytes: int) -> None:
            self.started = tensors

        def advance(self, name: str, nbytes: int) -> None:
            self.done += 1

        def finish(self) -> None:
            self.finished = True

    progress = Count()
    inspect_command(llama_folder(tmp_path / "a"), progress=progress)
    assert progress.started == progress.done == 21
    assert progress.finished


def test_requests_that_cannot_work_are_refused_before_reading(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(RecipeError, match="Did you mean zeros"):
        inspect_command(nowhere, sort="zero")
    with pytest.raises(RecipeError, match="Did you mean cosine"):
        diff_command(nowhere, nowhere, sort="cosin")
    with pytest.raises(RecipeError, match=r"0 .all tensors. or more"):
        inspect_command(nowhere, limit=-1)
    with pytest.raises(RecipeError, match=r"ends in .html"):
        inspect_command(nowhere, plot=tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        inspect_command(nowhere)


def test_a_damaged_file_is_named_and_leaves_no_page(llama_folder: Any, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "a")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        inspect_command(folder, plot=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    state = {"w": np.ones(3, np.float32)}
    with pytest.raises(OutputError, match="cannot be written"):
        inspect_command(state, plot=tmp_path / "no folder" / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        inspect_command(state, plot=tmp_path / "folder.html")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.html"]
