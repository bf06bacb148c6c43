"""Greedy soups over checkpoints choose what the function on tensors chooses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import weft
from weft.errors import RecipeError
from weft.merge.soups import greedy_soup

TARGET = np.float32([1.0, -1.0, 2.0])
RUNS = {
    "a": [1.4, -1.2, 2.2],
    "b": [0.7, -0.9, 1.7],
    "c": [5.0, 5.0, 5.0],
    "d": [1.1, -1.3, 2.3],
}
SCRIPT = """
import sys
from safetensors.numpy import load_file
import numpy as np
w = load_file(sys.argv[1] + "/model.safetensors")["w"]
print("scored", sys.argv[1])
print(-float(np.square(w - np.float32([1.0, -1.0, 2.0])).sum()))
"""


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    from safetensors.numpy import save_file

    for name, value in RUNS.items():
        (tmp_path / name).mkdir()
        save_file({"w": np.float32(value)}, str(tmp_path / name / "model.safetensors"))
    return [str(tmp_path / name) for name in RUNS]


def expected() -> np.ndarray:
    states = {n: {"w": np.float32(v)} for n, v in RUNS.items()}
    soup = greedy_soup(states, lambda s: -float(np.square(s["w"] - TARGET).sum()))
    assert 1 < len(soup.members) < len(RUNS)
    mixed: np.ndarray = soup.state["w"]
    return mixed


def test_shell_command(runs: list[str], tmp_path: Path, weft_command: Callable[..., object]) -> None:
    (tmp_path / "score it.py").write_text(SCRIPT)
    score = f"'{sys.executable}' '{tmp_path / 'score it.py'}' {{}}"
    done = weft_command(
        "merge", *runs, "--method", "greedy_soup", "--score", score, "-o", tmp_path / "out put", "--json"
    )
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    assert "greedy_soup kept" in json.loads(done.stdout)["notes"][-1]  # type: ignore[attr-defined]
    with weft.open(tmp_path / "out put") as made:
        np.testing.assert_array_equal(made["w"].numpy(), expected())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*RUNS, "score it.py", "out put"])


def test_python_scorer(runs: list[str], tmp_path: Path) -> None:
    def score(folder: Path) -> float:
        with weft.open(folder) as candidate:
            return -float(np.square(candidate["w"].numpy() - TARGET).sum())

    weft.run({"steps": [{"method": "greedy_soup", "models": runs}]}, tmp_path / "out", score=score)
    with weft.open(tmp_path / "out") as made:
        np.testing.assert_array_equal(made["w"].numpy(), expected())


@pytest.mark.parametrize(
    ("command", "words"), [("exit 3", "exit status 3"), ("echo good", "must be a number"), ("true", "printed nothing")]
)
def test_a_scorer_that_fails(command: str, words: str, runs: list[str], tmp_path: Path) -> None:
    recipe = {"steps": [{"method": "greedy_soup", "models": runs, "score": command}]}
    with pytest.raises(RecipeError, match=words):
        weft.run(recipe, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(RUNS)


def test_no_scorer(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs a scorer"):
        weft.run({"steps": [{"method": "greedy_soup", "models": runs}]}, tmp_path / "out")
