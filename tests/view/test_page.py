"""Pages: they stand alone, they parse, they hold the report's numbers, and no name can break out of its string."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.measure import model_difference, model_statistics
from weft.view.commands import diff_command, inspect_command
from weft.view.page import diff_page, inspect_page

VOID = {"meta", "input", "br", "img", "link", "hr"}
HOSTILE = [
    "</script><script>alert(1)</script>.weight",
    "<img src=x onerror=alert(2)>.3.{{data}}",
    "h.0.\x1b[2J\"'&{{title}}\u2028.weight",
]


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and the text of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        if self.open and self.open[-1] == "title":
            self.titles.append(data)


def data_of(text: str) -> dict[str, Any]:
    page = Page(text)
    (number,) = [i for i, (_, a) in enumerate([t for t in page.tags if t[0] == "script"]) if a.get("id") == "data"]
    data: dict[str, Any] = json.loads(page.scripts[number])
    return data


@pytest.fixture
def pages(llama_folder: Any, tmp_path: Path) -> list[str]:
    a, b = llama_folder(tmp_path / "a"), llama_folder(tmp_path / "b", seed=1)
    inspect_command(a, plot=tmp_path / "inspect.html", spectrum=True)
    text = diff_command(a, b, plot=tmp_path / "diff.html")
    assert text.endswith(f"Page written to {tmp_path / 'diff.html'}")
    return [(tmp_path / name).read_text(encoding="utf-8") for name in ("inspect.html", "diff.html")]


def test_a_page_needs_nothing_from_elsewhere(pages: list[str]) -> None:
    for text in pages:
        assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// ", ""))
        page = Page(text)
        assert not [tag for tag, a in page.tags if "src" in a or "href" in a or tag in ("link", "iframe", "object")]
        (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")


def test_a_page_can_be_read_by_everyone(pages: list[str]) -> None:
    for text, title in zip(pages, ("Weights of a", "a (a) against b (b)")):
        page = Page(text)
        assert page.titles == [title]
        assert ("html", {"lang": "en"}) in page.tags
        assert "prefers-color-scheme: dark" in text
        identifiers = [a["id"] for _, a in page.tags if "id" in a]
        assert len(identifiers) == len(set(identifiers))
        assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= set(identifiers)
        assert set(re.findall(r'find\("([a-z-]+)"\)', text)) <= set(identifiers)
        assert 'role="img"' in text
        assert "aria-label=" in text


def test_the_numbers_are_the_reports(llama_folder: Any, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "a", layers=3)
    report = model_statistics(folder)
    data = data_of(inspect_page(report))
    assert data["names"] == [row.name for row in report.tensors]
    keys = [metric["key"] for metric in data["metrics"]]
    for row, values in zip(report.tensors, data["values"]):
        assert values[keys.index("rms")] == pytest.approx(row.rms, rel=1e-6)  # pages keep seven digits
        assert values[keys.index("zero_share")] == row.zero_share
    for row, histogram in zip(report.tensors, data["histograms"]):
        assert histogram == [row.histogram.first, *row.histogram.counts]
    stack, outside = data["maps"]
    assert (stack["stack"], stack["layers"], len(stack["kinds"])) == ("model.layers", [0, 1, 2], 9)
    assert outside["stack"] is None
    assert sorted(i for m in data["maps"] for cell in m["cells"] for i in cell["tensors"]) == list(
        range(len(report.tensors))
    )
    for cell in stack["cells"]:
        (index,) = cell["tensors"]
        place = report.tensors[index].place
        assert (stack["kinds"][cell["kind"]], stack["layers"][cell["layer"]]) == (place.kind, place.layer)
        assert cell["values"] == data["values"][index]


def test_cells_of_several_tensors_take_them_together() -> None:
    random = np.random.default_rng(0)
    state = {f"h.0.experts.{e}.w1": random.standard_normal((3, 4)).astype(np.float32) for e in range(4)}
    data = data_of(inspect_page(model_statistics(state)))
    (cell,) = data["maps"][0]["cells"]
    assert cell["tensors"] == [0, 1, 2, 3]
    joined = np.concatenate(list(state.values()))
    assert cell["values"][0] == pytest.approx(np.sqrt(np.mean(joined.astype(np.float64) ** 2)), rel=1e-6)


def test_a_diff_lists_the_most_changed_first(llama_folder: Any, tmp_path: Path) -> None:
    report = model_difference(llama_folder(tmp_path / "a"), llama_folder(tmp_path / "b", seed=1))
    data = data_of(diff_page(report))
    changes = [report.tensors[i].relative_change for i in data["most"]]
    assert len(changes) == 20
    assert changes == sorted(changes, reverse=True)
    assert changes[0] == max(row.relative_change for row in report.tensors)
    same = data_of(diff_page(model_difference(tmp_path / "a", tmp_path / "a")))
    assert same["most"] == []


def test_hostile_names_stay_names() -> None:
    state = {name: np.ones((2, 3), np.float32) * i for i, name in enumerate(HOSTILE, 1)}
    for text in (inspect_page(model_statistics(state)), diff_page(model_difference(state, state))):
        data = data_of(text)
        assert data["names"] == HOSTILE
        assert len(re.findall("<script", text)) == 2
        assert "<img" not in text


def test_the_script_sets_markup_only_with_escaped_names() -> None:
    """Every text of the data that is written into markup passes ``escape``; all else is set as text."""
    text = resources.files("weft.view").joinpath("page.html").read_text(encoding="utf-8")
    assert "innerHTML" not in text
    written = re.findall(r"\$\{([^}]*)\}", text)
    risky = [w for w in written if re.search(r"\b(kind|names|label|spoken|stack)\b", w)]
    assert risky
    assert all(w.startswith("escape(") or w in ("spoken", "map.stack", 'map.stack || "layers"') for w in risky), risky


def test_anything_that_can_be_measured_can_be_drawn() -> None:
    odd = {
        "empty": np.zeros((0, 3), np.float32), "scalar": np.full((), 2.0), "ids": np.arange(4),
        "nan": np.full(3, np.nan, np.float32), "huge": np.array([1e300, -1e300]), "zero": np.zeros(3, np.float16),
    }  # fmt: skip
    for text in (inspect_page(model_statistics(odd, spectrum=True)), diff_page(model_difference(odd, odd))):
        assert data_of(text)["names"] == list(odd)
    apart = {"w": np.ones(3, np.float32)}, {"w": np.ones(4, np.float32)}
    assert data_of(diff_page(model_difference(*apart)))["maps"] == []
