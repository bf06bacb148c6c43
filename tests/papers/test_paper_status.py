"""Grades come from the registry and from committed studies, and from nothing else."""

import json
from pathlib import Path

import pytest

from weft.errors import WeftError
from weft.papers.catalogue import load
from weft.papers.methods import methods_by_goal, methods_text
from weft.papers.status import GRADES, Status, Study, grade, read_studies, statuses, studies, studies_json
from weft.registry import index


def entry(name: str, paper: str = "", *checked_by: str, goal: str = "combine", summary: str = "Does it.") -> dict:
    return {
        "name": name,
        "family": "merge",
        "goal": goal,
        "summary": summary,
        "paper": paper,
        "needs": "nothing",
        "checked_by": list(checked_by),
    }


def study(paper: str, verdict: str = "holds", scale: str = "5 M parameters", seeds: int = 5) -> Study:
    return Study(paper, verdict, scale, seeds, "better than the best single run", "0123abc")


def test_without_methods_all_is_planned() -> None:
    found = statuses([], [])
    assert list(found) == list(load())
    assert set(found.values()) == {Status()}
    # a study alone, of a method that is gone, makes nothing better
    assert statuses([], [study("model-soups")])["model-soups"].grade == "planned"


@pytest.mark.parametrize(
    ("checked_by", "results", "expected"),
    [
        ((), [], "lab"),
        (("brute force",), [], "lab"),
        (("brute force", "mergekit", "loader"), [], "lab"),
        ((), [study("model-soups")], "lab"),
        (("loader",), [study("model-soups")], "lab"),
        (("brute force",), [study("fisher-merging")], "lab"),
        (("brute force",), [study("model-soups")], "checked"),
        (("brute force",), [study("model-soups", "does not hold here")], "checked"),
        (("mergekit",), [study("model-soups")], "checked"),
        (("brute force", "loader"), [study("model-soups")], "checked"),
        (("brute force", "peft", "loader"), [study("model-soups")], "core"),
        (("mergekit", "gpu"), [study("model-soups")], "core"),
    ],
)
def test_grades(checked_by: tuple[str, ...], results: list[Study], expected: str) -> None:
    rows = [entry("soup", "model-soups", *checked_by), entry("linear", "", "closed form")]
    found = statuses(rows, results)
    assert found["model-soups"].grade == expected
    assert sum(s.grade == "planned" for s in found.values()) == 115
    by_goal = methods_by_goal(rows, results)
    assert [row.grade for row in by_goal["combine"] if row.name == "soup"] == [expected]


def test_a_paper_has_the_grade_of_its_best_method() -> None:
    rows = [entry("soup", "model-soups"), entry("greedy-soup", "model-soups", "brute force", "mergekit", "loader")]
    found = statuses(rows, [study("model-soups")])["model-soups"]
    assert found.grade == "core"
    assert found.methods == ("soup", "greedy-soup")
    assert found.checked_by == ("brute force", "mergekit", "loader")
    # oracles of different methods do not add up: neither of these two has all that core asks for
    rows = [entry("soup", "model-soups", "brute force", "mergekit"), entry("greedy-soup", "model-soups", "loader")]
    assert statuses(rows, [study("model-soups")])["model-soups"].grade == "checked"


def test_cells_carry_verdict_and_scale() -> None:
    rows = [entry("soup", "model-soups", "brute force")]
    results = [study("model-soups"), study("model-soups", "inconclusive", "an MLP on digits", 1)]
    cell = statuses(rows, results)["model-soups"].text
    assert cell == "checked; holds · 5 M parameters, 5 seeds; inconclusive · an MLP on digits, 1 seed"


def test_a_method_without_a_card_is_graded_by_studies_of_its_own() -> None:
    rows = [entry("ties", "", "brute force")]
    assert methods_by_goal(rows, [])["combine"][0].grade == "lab"
    assert methods_by_goal(rows, [study("ties")])["combine"][0].grade == "checked"
    assert {s.grade for s in statuses(rows, [study("ties")]).values()} == {"planned"}


def test_unknown_papers_are_errors() -> None:
    with pytest.raises(WeftError, match=r"method soup belongs to the paper 'model-soup'.* Did you mean model-soups"):
        statuses([entry("soup", "model-soup")], [])
    with pytest.raises(WeftError, match="a study belongs to the paper 'nothing-known'"):
        statuses([], [study("nothing-known")])


def test_grade_is_one_of_the_grades() -> None:
    assert [grade(names, studied) for names, studied in (((), False), (("a",), True), (("peft", "gpu"), True))] == [
        *GRADES[1:]
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "works"}, "verdict must be one of holds, does not hold here, inconclusive, got 'works'"),
        ({"seeds": 0}, "seeds must be a positive whole number"),
        ({"seeds": -1}, "seeds must be a positive whole number"),
        ({"seeds": True}, "seeds must be a positive whole number"),
        ({"seeds": "5"}, "seeds must be a positive whole number"),
        ({"scale": ""}, "scale must be text"),
        ({"commit": None}, "commit must be text"),
    ],
)
def test_wrong_results_are_named(tmp_path: Path, change: dict, message: str) -> None:
    good = json.loads(studies_json([study("model-soups")]))[0]
    file = tmp_path / "model-soups.json"
    file.write_text(json.dumps({**good, **change}), encoding="utf-8")
    with pytest.raises(WeftError, match=message) as error:
        read_studies([file])
    assert "model-soups.json" in str(error.value)


def test_results_round_trip(tmp_path: Path) -> None:
    rows = (study("awq"), study("model-soups"))
    (tmp_path / "b.json").write_text(
        json.dumps({**json.loads(studies_json(rows))[1], "table": [1, 2]}), encoding="utf-8"
    )
    (tmp_path / "a.json").write_text(studies_json(rows[:1]), encoding="utf-8")
    assert read_studies([tmp_path / "b.json", tmp_path / "a.json"]) == rows
    for text in ("[1]", "{", '"text"'):
        (tmp_path / "c.json").write_text(text, encoding="utf-8")
        with pytest.raises(WeftError, match=r"c\.json"):
            read_studies([tmp_path / "c.json"])


def test_the_committed_index_and_results_fit_the_cards() -> None:
    found = statuses()
    rows = index()
    with_paper = {row["paper"] for row in rows if row.get("paper")}
    assert {key for key, status in found.items() if status.grade != "planned"} == with_paper
    assert {s.paper for s in studies()} <= {*found, *(row["name"] for row in rows)}


def test_variants_are_folded_under_their_method() -> None:
    rows = [
        entry("ties"),
        entry("mergekit/ties"),
        entry("mergekit/only-there"),
        entry("salun", "salun", goal="edit", summary="Forgets."),
    ]
    found = methods_by_goal(rows, [])
    assert list(found) == ["combine", "edit"]
    assert [(row.name, row.variants) for row in found["combine"]] == [
        ("mergekit/only-there", ()),
        ("ties", ("mergekit/ties",)),
    ]
    text = methods_text(found, 60)
    assert text.splitlines()[0] == "combine: several models, or what they say, in one"
    assert "Does it. Also: mergekit/ties." in text
    assert max(len(line) for line in text.splitlines()) <= 60


def test_methods_of_the_registry_are_all_listed_once() -> None:
    names = [name for rows in methods_by_goal().values() for row in rows for name in (row.name, *row.variants)]
    assert sorted(names) == sorted(row["name"] for row in index())
