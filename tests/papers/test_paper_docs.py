"""What is generated from the cards is fresh, complete and valid Markdown."""

import re
from pathlib import Path

from weft.papers.catalogue import FAMILIES, load
from weft.papers.docs import collect_studies, docs_page, docs_table, repository, write
from weft.papers.status import RESULTS, Status, Study, studies_json

ROOT = Path(__file__).resolve().parents[2]


def test_committed_files_are_fresh() -> None:
    assert repository() == ROOT
    fix = "run `python -m weft.papers`"
    assert RESULTS.read_text(encoding="utf-8") == studies_json(collect_studies(ROOT)), fix
    assert (ROOT / "docs" / "papers.md").read_text(encoding="utf-8") == docs_page(), fix


def test_the_table_has_every_paper_once() -> None:
    lines = docs_table().splitlines()
    assert len(lines) == 2 + 116
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    assert [line.split("`")[1] for line in lines[2:]] == [
        card.key for family in FAMILIES for card in load().values() if card.family == family
    ]
    assert sum("](https://arxiv.org/abs/" in line for line in lines) == 114


def test_the_page_counts_grades_and_shows_verdicts() -> None:
    status = {key: Status() for key in load()}
    status["awq"] = Status("checked", ("awq",), ("gptq",), (Study("awq", "holds", "1 B | 2 B", 3, "c", "0"),))
    page = docs_page(status)
    assert "no method yet (115)" in page
    assert "paper's claim (1)" in page
    assert "| checked; holds · 1 B \\| 2 B, 3 seeds |" in page
    assert page.count("\n## ") == len(FAMILIES)
    assert "{" not in page


def test_rewriting_gives_the_same_files(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("weft.papers.docs.RESULTS", tmp_path / "results.json")
    files = write(tmp_path)
    assert [file.name for file in files] == ["results.json", "papers.md"]
    assert files[0].read_text(encoding="utf-8") == "[]\n"
    assert files[1].read_text(encoding="utf-8").count("| `") == 116
