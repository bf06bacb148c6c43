"""Comparisons of candidates: one pass, honest rows, a best one, and a run that is stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

from weft.calibrate import Change, Statistics, Walk
from weft.errors import NonFiniteError, OutputError, RecipeError
from weft.quantize import GPTQ, RTN, Curves, compare_methods, evaluate, quantize_model
from weft.view.evidence import comparison_page

CANDIDATES: dict[str, Change] = {"gptq 4": GPTQ(4, 16), "rtn 4": RTN(4, 16), "rtn 2": RTN(2, 16), "rtn 8": RTN(8, 16)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], list[Any]]:
    root = tmp_path_factory.mktemp("compare")
    model, batches = build("llama", torch.float32)
    model.save_pretrained(root / "model")
    return root / "model", batches[:1], batches[1:]


def test_rows_say_what_quantising_gives(llama: tuple[Path, list[Any], list[Any]], tmp_path: Path) -> None:
    model, data, held_out = llama
    walks: list[bool] = []
    enter = Walk.__enter__

    def counted(self: Walk) -> Walk:
        first = self.batches[0]["input_ids"]
        walks.append(first.shape == data[0]["input_ids"].shape and torch.equal(first, data[0]["input_ids"]))
        return enter(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "__enter__", counted)
        found = compare_methods(model, CANDIDATES, data, held_out, tmp_path / "out", mixed=[5], keep=True)
    assert sum(walks) == 2  # one for all statistics, one for what the mixed candidate is chosen by
    out = tmp_path / "out"
    assert json.loads((out / "comparison.json").read_text()) == found
    assert sorted(p.name for p in out.iterdir()) == ["comparison.json", "curves.json", "models"]
    assert not list(tmp_path.glob("*.partial"))
    rows = {row["candidate"]: row for row in found["rows"]}
    assert list(rows) == [*CANDIDATES, "mixed 5"]
    assert not any(row["failed"] for row in rows.values())
    for label, row in rows.items():
        folder = out / "models" / label.replace(" ", "-")
        assert row["loss"] == row["scores"]["kl"] == pytest.approx(evaluate(folder, held_out, model)["kl"])
    alone = quantize_model(model, tmp_path / "alone", RTN(4, 16))
    assert evaluate(alone, held_out, model)["kl"] == pytest.approx(rows["rtn 4"]["loss"])
    assert found["original"]["scores"]["perplexity"] == pytest.approx(evaluate(model, held_out)["perplexity"])
    assert rows["rtn 2"]["bytes"] < rows["rtn 4"]["bytes"] == rows["gptq 4"]["bytes"] < rows["rtn 8"]["bytes"]
    assert rows["rtn 2"]["loss"] > rows["rtn 4"]["loss"] > rows["rtn 8"]["loss"]
    for row in found["rows"]:
        beaten = any(
            o["bytes"] <= row["bytes"]
            and o["loss"] <= row["loss"]
            and (o["bytes"], o["loss"]) != (row["bytes"], row["loss"])
            for o in found["rows"]
        )
        assert row["pareto"] is not beaten
    fits = [r for r in found["rows"] if r["loss"] <= 0.05]
    assert found["best"] == min(fits, key=lambda r: (r["bytes"], r["loss"]))["candidate"]
    assert found["verdict"].startswith(found["best"])
    curves = Curves.load(out / "curves.json")
    assert (
        found["layers"]["model.layers.0.mlp.up_proj"]["rtn 2"]
        == curves.by("relative")["model.layers.0.mlp.up_proj"]["rtn 2"][1]
    )
    page = comparison_page(found)
    bits, errors = zip(*found["frontier"])
    assert list(bits) == sorted(bits)
    assert list(errors) == sorted(errors, reverse=True)
    assert page.count("<circle") == 5 + len(bits)
    assert "<script" not in page
    budget = rows["rtn 4"]["bytes"]
    walks.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "__enter__", counted)
        within = compare_methods(model, CANDIDATES, data, held_out, tmp_path / "b", budget=budget)
    assert sum(walks) == 1
    assert (
        within["best"] == min((r for r in within["rows"] if r["bytes"] <= budget), key=lambda r: r["loss"])["candidate"]
    )
    with pytest.raises(OutputError, match="exists already"):
        compare_methods(model, CANDIDATES, data, held_out, out)
    with pytest.raises(OutputError, match="no comparison"):
        compare_methods(model, CANDIDATES, data, held_out, model, force=True)
    none = compare_methods(model, {"rtn 2": RTN(2, 16)}, data, held_out, out, tolerance=0, sequential=True, force=True)
    assert none["best"] is None
    assert none["verdict"].startswith("None has a loss of at most 0; the nearest is rtn 2")


class Huge(RTN):
    """Values that overflow in the network."""

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Any:
        return super().fit(name, weight * 1e36, statistics)


class Fails(Change):
    """Always."""

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Any:
        raise NonFiniteError("<b>this one never works</b>")


class Broken(Change):
    """Not on purpose."""

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Any:
        return weight @ torch.ones(3)


def test_what_fails_is_a_row(llama: tuple[Path, list[Any], list[Any]], tmp_path: Path) -> None:
    model, data, held_out = llama
    candidates = {
        "huge": Huge(8, 16),
        "<i>fails</i>": Fails(),
        "groups": RTN(4, 20),
        "rtn 8": RTN(8, 16),
        "broken": Broken(),
    }
    found = compare_methods(model, candidates, data, held_out, tmp_path / "out", mixed=[1])
    rows = {row["candidate"]: row for row in found["rows"]}
    assert "finite" in rows["huge"]["failed"]
    assert rows["<i>fails</i>"]["failed"].endswith("q_proj: <b>this one never works</b>")
    assert "do not divide" in rows["groups"]["failed"]
    assert "No choice fits" in rows["mixed 1"]["failed"]
    assert rows["broken"]["failed"]
    assert found["best"] == "rtn 8"
    assert all(row["loss"] is None and not row["pareto"] for label, row in rows.items() if label != "rtn 8")
    page = comparison_page(found)
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;this one never works" in page
    assert page.count("<circle") == 1 + len(found["frontier"])
    alone = compare_methods(model, {"groups": RTN(4, 20)}, data, held_out, tmp_path / "alone")
    assert alone["best"] is None
    assert "No candidate could be made" in alone["verdict"]


class Stops(RTN):
    """Is interrupted in the second block while armed."""

    armed: ClassVar[bool] = False

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Any:
        if Stops.armed and ".1." in name:
            raise KeyboardInterrupt
        return super().fit(name, weight, statistics)


def test_a_run_that_is_stopped_goes_on(
    llama: tuple[Path, list[Any], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, held_out = llama
    candidates = {"rtn 4": RTN(4, 16), "stops": Stops(3, 16)}
    out = tmp_path / "out"
    monkeypatch.setattr(Stops, "armed", True)
    with pytest.raises(KeyboardInterrupt):  # while errors are measured
        compare_methods(model, candidates, data, held_out, out)
    assert (tmp_path / "out.partial" / "statistics" / "statistics.json").is_file()
    walked: list[str] = []
    monkeypatch.setattr("weft.quantize.compare.collect", lambda *a, **k: walked.append("collect"))
    monkeypatch.setattr(Stops, "armed", False)
    made = quantize_model

    def once(*arguments: Any, **options: Any) -> Any:
        if not walked:
            walked.append("interrupted")
            raise KeyboardInterrupt
        return made(*arguments, **options)

    monkeypatch.setattr("weft.quantize.compare.quantize_model", once)
    with pytest.raises(KeyboardInterrupt):  # before the first candidate is made
        compare_methods(model, candidates, data, held_out, out)
    assert (tmp_path / "out.partial" / "curves.json").is_file()
    found = compare_methods(model, candidates, data, held_out, out)
    assert walked == ["interrupted"]
    monkeypatch.undo()
    fresh = compare_methods(model, candidates, data, held_out, tmp_path / "fresh")

    def plain(value: dict[str, Any]) -> dict[str, Any]:
        rows = [
            {**r, "seconds": 0, "scores": {**r["scores"], "seconds": 0}} for r in [*value["rows"], value["original"]]
        ]
        return {**value, "rows": rows, "original": 0, "seconds": 0}

    assert plain(found) == plain(fresh)


def test_an_encoder_by_its_embeddings(tmp_path: Path) -> None:
    model, batches = build("bert", torch.float32)
    model.save_pretrained(tmp_path / "model")
    found = compare_methods(
        tmp_path / "model", {"a": RTN(8, 16), "b": RTN(2, 16)}, batches[:1], batches[1:], tmp_path / "out"
    )
    assert found["score"] == "cosine_distance"
    assert found["rows"][0]["loss"] < found["rows"][1]["loss"]
    assert found["tolerance"] == 0.02


def test_what_cannot_be(llama: tuple[Path, list[Any], list[Any]], tmp_path: Path) -> None:
    model, data, held_out = llama
    with pytest.raises(RecipeError, match="nothing to compare"):
        compare_methods(model, {}, data, held_out, tmp_path / "out")
    with pytest.raises(RecipeError, match="0 batches"):
        compare_methods(model, CANDIDATES, data, [], tmp_path / "out")
    with pytest.raises(RecipeError, match="differ in letters"):
        compare_methods(model, {"a b": RTN(4, 16), "a/b": RTN(4, 16)}, data, held_out, tmp_path / "out")
    with pytest.raises(RecipeError, match="none is called original"):
        compare_methods(model, {"original": RTN(4, 16)}, data, held_out, tmp_path / "out")
    assert not list(tmp_path.iterdir())
