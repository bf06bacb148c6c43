"""What verdicts of studies rest on."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from weft.papers.catalogue import load
from weft.papers.status import read_studies

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "studies" / "results").glob("*.json"))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("studies._harness")


def test_the_interval_is_the_t_interval(harness: ModuleType) -> None:
    mean, half = harness.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # from tables: t(0.975, 4) = 2.776, deviation sqrt(2.5)
    assert mean == 3
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
    assert harness.interval([1.0]) == (1.0, math.inf)


def test_verdicts_are_those_of_paired_differences(harness: ModuleType) -> None:
    base = [50.0, 60.0, 70.0, 80.0, 90.0]  # far apart: only pairing shows the difference of 1
    better = [51.0, 61.1, 70.9, 81.0, 91.1]
    assert harness.verdict(better, base, higher_is_better=True) == "holds"
    assert harness.verdict(base, better, higher_is_better=True) == "does not hold here"
    assert harness.verdict(base, better, higher_is_better=False) == "holds"
    assert harness.verdict([51.0, 59.0, 71.0, 79.0, 90.0], base, higher_is_better=True) == "inconclusive"
    assert harness.verdict([99.0], [1.0], higher_is_better=True) == "inconclusive"


def test_settings_are_chosen_on_validation_only(harness: ModuleType) -> None:
    asked = []

    def measure(setting: int, seed: int) -> tuple[float, float]:
        asked.append((setting, seed))
        return float(setting), float(-setting)  # the best on validation is the worst on test

    values, chosen = harness.compare({"a": [1, 3, 2]}, measure, seeds=2, higher_is_better=True)
    assert (values, chosen) == ({"a": [-3.0, -3.0]}, {"a": 3})
    assert harness.compare({"a": [1, 3, 2]}, measure, seeds=1, higher_is_better=False)[1] == {"a": 1}
    compared = {seed for _, seed in asked} - set(harness.SELECTION_SEEDS)
    assert compared == {0, 1}


def test_splits_do_not_overlap(harness: ModuleType) -> None:
    data = harness.digits(3, 500)
    parts = [{tuple(i.flatten().tolist()) for i in images} for images, _ in (data.train, data.validation, data.test)]
    assert [len(p[0]) for p in (data.train, data.validation, data.test)] == [500, 300, 997]
    # a few of the 1797 digits are drawn alike
    assert all(len(a & b) <= 3 for a in parts for b in parts if a is not b)
    assert torch.equal(harness.digits(3, 500).test[0], data.test[0])
    texts = harness.source_text()
    assert [len(t) > 100_000 for t in texts] == [True] * 3
    assert all(int(t.max()) < harness.VOCABULARY for t in texts)


def test_the_language_model_cannot_see_ahead(harness: ModuleType) -> None:
    model = harness.LanguageModel(width=16, layers=2, heads=2, length=8).eval()
    first = torch.randint(128, (1, 8))
    second = first.clone()
    second[0, 5:] = (first[0, 5:] + 1) % 128
    torch.testing.assert_close(model(first)[0, :5], model(second)[0, :5])
    assert not torch.allclose(model(first)[0, 5:], model(second)[0, 5:])


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_committed_results_fit_the_catalogue(path: Path) -> None:
    (study,) = read_studies([path])
    assert study.paper == path.stem
    assert study.paper in load()
    assert study.seeds >= 5
