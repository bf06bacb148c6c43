"""Cards and lists fit the terminal, lose nothing, and are valid JSON on demand."""

import importlib
import json

import pytest

from weft.errors import RecipeError
from weft.method import GOALS
from weft.papers.catalogue import load
from weft.papers.commands import methods_command, papers_command
from weft.papers.search import Hit
from weft.papers.status import Status, statuses
from weft.papers.text import card_dict, card_text, hits_text, run_lines, table, wrap
from weft.registry import index


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", [30, 59, 60, 80, 110])
def test_cards_fit_and_lose_nothing(width: int) -> None:
    for card in load().values():
        text = card_text(card, Status(), [], width)
        longest = max(text.splitlines(), key=len)
        assert len(longest) <= width or " " not in longest.strip(), (card.key, longest)
        whole = squeezed(text)
        for part in (card.title, card.summary, card.use_when, card.not_when, card.differences, card.url, card.path):
            assert squeezed(part) in whole, card.key
        for part in (*card.have, *card.want, *card.compare, card.needs.data, card.needs.gradients, card.needs.memory):
            assert squeezed(part) in whole, card.key


def test_a_planned_card_says_so_everywhere() -> None:
    card = load()["layer-norm"]
    text = card_text(card, Status(), [], 100)
    assert text.splitlines()[0] == "layer-norm · normalize · planned"
    assert "Run it here   planned: weft.normalize.layer_norm" in text
    assert "As planned" in text
    assert "Differences" not in text


def test_a_card_with_a_method_says_how_to_run_it() -> None:
    entries = [{"name": "soup", "family": "merge", "paper": "model-soups", "goal": "combine", "summary": "s",
                "base": "none", "checked_by": ["brute force"],
                "shell": "weft merge A B --method soup -o OUT", "call": "weft.merge.soup(tensors, lambda_=1.0)",
                "parameters": [{"field": "lambda_", "key": "lambda", "default": 1.0, "required": False},
                               {"field": "weights", "key": "weights", "required": True}]}]  # fmt: skip
    status = statuses(entries, [])["model-soups"]
    text = card_text(load()["model-soups"], status, entries, 100)
    assert "Run it here   weft merge A B --method soup -o OUT\n" in text
    assert "weft.merge.soup(tensors, lambda_=1.0)" in text
    assert "planned" not in text
    assert "Checked by    brute force" in text
    data = card_dict(load()["model-soups"], status, entries)
    assert data["run"] == ["weft merge A B --method soup -o OUT", "weft.merge.soup(tensors, lambda_=1.0)"]
    assert data["status"]["grade"] == "lab"


def test_python_calls_on_cards_exist() -> None:
    checked = 0
    for entry in index():
        for line in run_lines(entry):
            if line.startswith("weft."):
                built = line.removeprefix("weft.parametrize_(model, ")
                path, _, name = built.partition("(")[0].rpartition(".")
                assert callable(getattr(importlib.import_module(path), name)), line
                checked += 1
    assert checked >= 2


def test_tables_align_and_fold() -> None:
    rows = [("a", "lab", "one two three four five six seven eight"), ("longer", "core", "x")]
    assert table(rows, 40).splitlines() == [
        "a       lab   one two three four five",
        "              six seven eight",
        "longer  core  x",
    ]
    assert table(rows, 20).splitlines()[:2] == ["a       lab", "  one two three four"]
    assert table([], 40) == ""
    assert wrap("one two three", 8, lines=1) == ["one two …"] or len(wrap("one two three", 8, lines=1)[0]) <= 8
    hits = [Hit(card, 1.0) for card in load().values()]
    for width in (20, 40, 80, 110):
        text = hits_text(hits, {key: Status() for key in load()}, width, lines=1)
        assert all(len(line) <= max(width, 50) for line in text.splitlines())
        assert all(key in text for key in load())


@pytest.mark.parametrize(
    "query",
    ["model-soups", "Model-Soups", " 2203.05482 ", "arXiv:2203.05482v3", "https://arxiv.org/abs/2203.05482",
     "http://arxiv.org/pdf/2203.05482v1.pdf"],
)  # fmt: skip
def test_a_name_shows_the_card(query: str) -> None:
    assert papers_command(query, width=80).startswith("model-soups · merge · ")
    assert json.loads(papers_command(query, json=True))["key"] == "model-soups"


def test_words_show_a_list() -> None:
    text = papers_command("fine-tunes interfere", width=80)
    assert text.startswith('Papers for "fine-tunes interfere"')
    assert text.splitlines()[2].startswith("pcb-merging")
    data = json.loads(papers_command("fine-tunes interfere", limit=2, json=True))
    assert data["papers"][0]["key"] == "pcb-merging"
    assert len(data["papers"]) == 2
    assert data["nearest"] is False
    # facets make a name a search
    assert papers_command("model-soups", family="merge", width=80).startswith("Papers for")


def test_no_words_show_all_and_facets_count() -> None:
    assert papers_command(None, width=80).startswith("116 of 116 papers")
    assert papers_command("", limit=3, width=80).startswith("3 of 116 papers")
    edits = papers_command(family="edit", width=80)
    assert edits.startswith("3 of 3 papers")
    assert len(edits.splitlines()) == 5


def test_nothing_found_is_flagged() -> None:
    assert papers_command("xyzzy", width=80).startswith('No paper fits "xyzzy"; the nearest:')
    assert json.loads(papers_command("xyzzy", json=True))["nearest"] is True


def test_every_card_is_json() -> None:
    for key in load():
        data = json.loads(papers_command(key, json=True))
        assert data["key"] == key
        assert data["goal"] in GOALS
        assert data["run"]


def test_methods_by_goal_and_as_json() -> None:
    assert "ties" in methods_command("combine", width=80)
    assert methods_command(None, width=80) == methods_command("", width=80)
    data = json.loads(methods_command(json=True))
    assert "mergekit/ties" in next(row for row in data["combine"] if row["name"] == "ties")["variants"]
    empty = set(GOALS) - set(data)
    for goal in empty:
        assert f"weft papers --want {goal}" in methods_command(goal)
        assert json.loads(methods_command(goal, json=True)) == {}
    with pytest.raises(RecipeError, match="Did you mean combine"):
        methods_command("combin")
