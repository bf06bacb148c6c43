"""How far weft has each paper, computed from the registry and from committed study results, never written by hand.

planned   no method yet
lab       a method in the registry, so it passes the family's contract
checked   lab, an oracle in its tests, and a study of the paper's claim
core      checked, a peer library agrees, and a run through the loader or at GPU scale
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from weft.errors import WeftError, did_you_mean
from weft.papers.catalogue import load
from weft.registry import index as registry_index

GRADES = ("planned", "lab", "checked", "core")
VERDICTS = ("holds", "does not hold here", "inconclusive")
PEERS = frozenset(
    {
        "mergekit",
        "peft",
        "compressed-tensors",
        "scikit-learn",
        "statsmodels",
        "scipy",
        "timm",
        "torchao",
        "transformers",
    }
)
RUNS = frozenset({"loader", "gpu"})  # entries of ``checked_by`` that are runs, not oracles
RESULTS = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Study:
    """The committed result of one study.

    Attributes:
        paper: key of the card, or the id of a method that has none.
        verdict: one of ``VERDICTS``.
        scale: at which scale, in words ("5 M parameters").
        seeds: how many seeds.
        claim: what was tested.
        commit: of the code that ran.
    """

    paper: str
    verdict: str
    scale: str
    seeds: int
    claim: str
    commit: str

    @property
    def text(self) -> str:
        """Verdict and scale in a few words."""
        return f"{self.verdict} · {self.scale}, {self.seeds} seed{'s' if self.seeds != 1 else ''}"


@dataclass(frozen=True)
class Status:
    """How far weft has one paper.

    Attributes:
        grade: one of ``GRADES``, that of the best method.
        methods: ids of its methods in the registry.
        checked_by: what its methods are held against.
        studies: committed results.
    """

    grade: str = "planned"
    methods: tuple[str, ...] = ()
    checked_by: tuple[str, ...] = ()
    studies: tuple[Study, ...] = ()

    @property
    def text(self) -> str:
        """The grade and what the studies say, for a cell of a table."""
        return "; ".join([self.grade, *(s.text for s in self.studies)])


@cache
def studies(file: Path = RESULTS) -> tuple[Study, ...]:
    """The committed results.

    Raises:
        WeftError: a result is wrong; the message names the file.
    """
    return read_studies([file])


def read_studies(files: Iterable[Path]) -> tuple[Study, ...]:
    """The results in JSON files of one object or a list of them, in the order of papers and claims."""
    found = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WeftError(f"{file}: this is not JSON: {error}.") from error
        for row in content if isinstance(content, list) else [content]:
            problem = _problem(row)
            if problem:
                raise WeftError(f"{file}: {problem}.")
            found.append(Study(**{f.name: row[f.name] for f in fields(Study)}))
    return tuple(sorted(found, key=lambda s: (s.paper, s.claim, s.scale)))


def studies_json(results: Sequence[Study]) -> str:
    """The text of the packaged file of results."""
    return json.dumps([asdict(s) for s in results], indent=1, ensure_ascii=False) + "\n"


def _problem(row: Any) -> str:
    if not isinstance(row, dict):
        return f"a result must be an object, got {row!r}"
    for field in fields(Study):
        value = row.get(field.name)
        kind = int if field.name == "seeds" else str
        if type(value) is not kind or not value or value in ("", 0):
            return f"{field.name} must be {'a positive whole number' if kind is int else 'text'}, got {value!r}"
    if row["seeds"] < 1:
        return f"seeds must be a positive whole number, got {row['seeds']}"
    if row["verdict"] not in VERDICTS:
        return f"verdict must be one of {', '.join(VERDICTS)}, got {row['verdict']!r}"
    return ""


def grade(checked_by: Iterable[str], studied: bool) -> str:
    """The grade of a method from what it is checked by and whether a study of its claim is committed.

    >>> grade(["brute force"], studied=False), grade(["brute force"], studied=True)
    ('lab', 'checked')
    >>> grade(["brute force", "mergekit", "loader"], studied=True)
    'core'
    """
    names = set(checked_by)
    if not studied or not names - RUNS:
        return "lab"
    return "core" if names & PEERS and names & RUNS else "checked"


def statuses(
    index: Sequence[Mapping[str, Any]] | None = None, results: Sequence[Study] | None = None
) -> dict[str, Status]:
    """The status of every paper by key.

    Args:
        index: entries of the registry, those of ``weft.registry.index()`` if None.
        results: committed studies, the packaged ones if None.

    Raises:
        WeftError: an entry or a result names a paper that is not in the catalogue.
    """
    entries = registry_index() if index is None else index
    done = studies() if results is None else results
    known = {*load(), *(entry["name"] for entry in entries)}
    for name, owner in [(e.get("paper", ""), f"method {e['name']}") for e in entries] + [
        (s.paper, "a study") for s in done
    ]:
        if name and name not in known:
            raise WeftError(f"{owner} belongs to the paper {name!r}, which has no card.{did_you_mean(name, known)}")
    result = {}
    for key in load():
        rows = [e for e in entries if e.get("paper") == key]
        mine = tuple(s for s in done if s.paper == key)
        grades = [grade(e.get("checked_by", ()), bool(mine)) for e in rows]
        result[key] = Status(
            grade=max(grades, key=GRADES.index, default="planned"),
            methods=tuple(e["name"] for e in rows),
            checked_by=tuple(dict.fromkeys(c for e in rows for c in e.get("checked_by", ()))),
            studies=mine,
        )
    return result
