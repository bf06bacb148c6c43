"""Results of benchmarks as tables of the documentation.

python benchmarks/tables.py        writes them into docs/quantize.md, between the marks of each
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "quantize.md"
BITS = ("8", "4", "3", "2")


def quality(rows: dict[str, dict[str, float]], score: str) -> str:
    """Methods by bits: the score, and in brackets bits a weight and, where they were taken, seconds."""
    found: dict[str, dict[str, str]] = {}
    for label, row in rows.items():
        method, _, bits = label.rpartition(" ")
        if bits in BITS:
            value = f"{row[score]:.2f}" if row[score] > 10 else f"{row[score]:.3g}"
            seconds = f", {row['seconds']:.0f} s" if "seconds" in row else ""
            found.setdefault(method, {})[bits] = f"{value} ({row['bits_per_weight']:.2f}{seconds})"
    lines = ["| method | " + " | ".join(f"{b} bits" for b in BITS) + " |", "|---" * (len(BITS) + 1) + "|"]
    lines += [f"| {m} | " + " | ".join(cells.get(b, "") for b in BITS) + " |" for m, cells in sorted(found.items())]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Each table by the name of its marks."""
    facts: dict[str, Any] = json.loads((RESULTS / "quantize_quality.json").read_text())
    return {
        "quality-language": quality(facts["language"], "perplexity"),
        "quality-encoder": quality(facts["encoder"], "one_minus_cosine"),
    }


def written(page: str, made: dict[str, str]) -> str:
    """A page with each table between its marks."""
    for name, table in made.items():
        first, last = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        start = page.index(first) + len(first)
        page = page[:start] + table + page[page.index(last, start) :]
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
