"""Tables of measurements in the documentation are those of the committed results."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_are_of_the_results(monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import tables

    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.written(page, tables.tables()) == page, "run python benchmarks/tables.py"
    assert tables.written(page, dict.fromkeys(tables.tables(), "other")) != page
