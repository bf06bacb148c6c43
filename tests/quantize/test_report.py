"""Reports of quantised models: their numbers against the model's files, hostile names, comparisons, what is damaged."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

import weft
from weft.errors import CheckpointError
from weft.quantize import GPTQ, RTN, compare_reports, evaluate, quantize_model, write_report
from weft.view.evidence import report_page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Any]]:
    root = tmp_path_factory.mktemp("report")
    model, batches = build("llama", torch.bfloat16)
    model.save_pretrained(root / "model")
    quantize_model(root / "model", root / "out", {"*": GPTQ(3, 16), "down_proj": RTN(8, 16)}, batches)
    return root / "model", root / "out", batches


def check_page(text: str) -> None:
    """It is complete, has no script, and asks nothing of anyone."""

    class Checker(HTMLParser):
        open_: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "img", "link", "iframe", "object")
            assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
            if tag not in ("meta", "line", "circle", "polyline"):
                self.open_.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("line", "circle", "polyline"):
                assert self.open_.pop() == tag

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.handle_starttag(tag, attrs)
            if tag not in ("meta", "line", "circle", "polyline"):
                self.open_.pop()

    checker = Checker()
    checker.open_ = []
    checker.feed(text)
    assert checker.open_ == []
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "default-src 'none'" in text


def tensor_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def test_numbers_are_those_of_the_files(made: tuple[Path, Path, list[Any]], tmp_path: Path) -> None:
    model, out, batches = made
    scores = {"before": evaluate(model, batches), "after": evaluate(out, batches, model)}
    report = write_report(
        out, before=model, seconds=12.5, layer_seconds={"model.layers.0.mlp.up_proj": 0.25}, peak_memory=3_000_000_000,
        scores=scores, output=tmp_path / "evidence",
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "evidence").iterdir()) == ["report.json"]
    assert json.loads((tmp_path / "evidence" / "report.json").read_text()) == report
    known = json.loads((out / "weft.json").read_text())["layers"]
    summary = report["summary"]
    assert summary["layers"] == len(known) == 21
    assert summary["bytes"] == tensor_bytes(out)
    assert summary["bytes_before"] == tensor_bytes(model)
    assert summary["bits_per_parameter"] == 8 * summary["bytes"] / sum(
        p.numel() for p in build("llama", torch.bfloat16)[0].parameters()
    )
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        packed = {n: file.get_tensor(n).nbytes for n in file.keys() if ".weight_" in n}  # noqa: SIM118
    weights = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert summary["bits_per_weight"] == pytest.approx(8 * sum(packed.values()) / weights)
    rows = report["layers"]
    errors = [row["output_error"] for row in rows if row["output_error"] is not None]
    assert errors == sorted(errors, reverse=True)
    for row in rows:
        notes = known[row["layer"]]
        assert row["error"] == notes["error"]
        assert row["bits"] == notes["bits"]
        assert row.get("output_error") == notes.get("output_error")
        assert row["block"] == ".".join(row["layer"].split(".")[:3])
    assert [b["block"] for b in report["blocks"]] == [f"model.layers.{i}" for i in range(3)]
    for block in report["blocks"]:
        mine = [r["output_error"] for r in rows if r["block"] == block["block"] and r["output_error"] is not None]
        assert block["largest"] == max(mine)
        assert block["mean"] == pytest.approx(sum(mine) / len(mine))
    assert next(r for r in rows if r["layer"] == "model.layers.0.mlp.up_proj")["seconds"] == 0.25
    page = report_page(report)
    check_page(page)
    assert page.count("<circle") == len(errors)
    assert page.count('class="mark strong"') == 10
    for text in ("12.5 s", "3 GB", "KL to the original", "The worst 10 layers", rows[0]["layer"], rows[-1]["layer"]):
        assert text in page
    assert (
        page.index(f">{rows[0]['layer']}</td>")
        < page.index("All other layers")
        < page.index(f">{rows[-1]['layer']}</td>")
    )


def test_a_report_in_the_folder_does_no_harm(made: tuple[Path, Path, list[Any]], tmp_path: Path) -> None:
    _, out, batches = made
    write_report(out)
    assert write_report(out)["summary"]["seconds"] is None
    assert (out / "report.json").is_file()
    assert evaluate(out, batches)["perplexity"] > 0
    with weft.open(out) as opened:
        assert opened.packed
    quantize_model(out, tmp_path / "again", RTN(8, 16), format="dense")
    assert not (tmp_path / "again" / "report.json").exists()


def test_notes_and_hostile_names(tmp_path: Path) -> None:
    """What stands in weft.json may be anything."""
    evil = '<script>alert("1")</script>.0.x\x1b[2J'
    model, _ = build("llama", torch.float32)
    model.save_pretrained(tmp_path / "model")
    layers = {
        evil: {"error": 0.5, "form": "<b>affine</b>", "bits": 4, "failed": "<img src=x onerror=alert(1)>"},
        "model.layers.1.a": {"error": 0.1, "few_rows": 3, "dense": "its matrix has no tensor of its own"},
        "model.layers.1.b": {"error": float("nan"), "output_error": None, "notes": ["damping 0.1 <instead> of 0.01"]},
        "lm_head": {"error": 0.2, "bits": "many", "outlier": [1]},
    }
    (tmp_path / "model" / "weft.json").write_text(json.dumps({"model": "<i>m</i>", "layers": layers}))
    report = write_report(tmp_path / "model", scores={"<u>": {"perplexity": float("inf")}, "b": {"perplexity": 3.0}})
    assert report["measure"] == "output_error"
    assert report["notes"]["few_rows"] == ["model.layers.1.a"]
    assert report["notes"]["failed"] == [{"layer": evil, "reason": "<img src=x onerror=alert(1)>"}]
    assert report["notes"]["dense"] == ["model.layers.1.a"]
    assert report["scores"]["<u>"]["perplexity"] is None
    page = report_page(report)
    check_page(page)
    assert "<b>" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    assert "1 layer saw too few rows" in page
    del layers["model.layers.1.b"]
    (tmp_path / "model" / "weft.json").write_text(json.dumps({"layers": layers}))
    report = write_report(tmp_path / "model")
    assert report["measure"] == "error"
    assert [r["layer"] for r in report["layers"]] == [evil, "lm_head", "model.layers.1.a"]
    check_page(report_page(report))


def test_two_reports(made: tuple[Path, Path, list[Any]], tmp_path: Path) -> None:
    model, out, batches = made
    quantize_model(model, tmp_path / "two", GPTQ(2, 16), batches, where="re:.*(q|k)_proj")
    a = write_report(out, output=tmp_path / "a", seconds=2.0, scores={"after": {"kl": 0.1}})
    b = write_report(tmp_path / "two", seconds=3.0, scores={"after": {"kl": 0.3}, "before": {"kl": 0}})
    found = compare_reports(tmp_path / "a", tmp_path / "two")
    assert found == compare_reports(a, b) == compare_reports(tmp_path / "a" / "report.json", b)
    assert found["summary"]["seconds"] == {"a": 2.0, "b": 3.0, "difference": 1.0}
    assert found["scores"]["after"]["kl"]["difference"] == pytest.approx(0.2)
    assert list(found["scores"]) == ["after"]
    assert len(found["layers"]) == 6
    assert len(found["only_a"]) == 15
    assert found["only_b"] == []
    ratios = [row["ratio"] for row in found["layers"]]
    assert ratios == sorted(ratios, reverse=True)
    assert min(ratios) > 1
    assert all(row["ratio"] == row["b"] / row["a"] for row in found["layers"])


def test_what_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no weft\.json"):
        write_report(tmp_path)
    for text in ('{"layers": {}}', '{"layers": [1]}', '{"layers": {"a": 3}}', "{}"):
        (tmp_path / "weft.json").write_text(text)
        with pytest.raises(CheckpointError, match="says nothing of layers"):
            write_report(tmp_path)
    for text in ("[]", "{}", "{", '{"format": "weft quantisation report", "version": 1}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(CheckpointError):
            compare_reports(tmp_path, tmp_path)
