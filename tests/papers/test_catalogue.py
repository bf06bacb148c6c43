"""The cards are complete, unique and in the vocabulary; a wrong card is named with its file."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from weft.errors import RecipeError, WeftError
from weft.method import GOALS
from weft.papers.catalogue import CARDS, FAMILIES, HAVE, load, paper
from weft.registry import index

GOOD = (CARDS / "layer-norm.toml").read_text(encoding="utf-8")


def test_all_papers_are_there_once() -> None:
    cards = load().values()
    assert len(cards) == len(list(CARDS.glob("*.toml"))) == 116
    for field in ("key", "title", "path", "summary"):
        assert max(Counter(getattr(card, field) for card in cards).values()) == 1, field
    assert sum(not card.arxiv for card in cards) == 2  # VIRGO and PRESTO are cited by their proceedings


def test_vocabularies_are_used_and_sufficient() -> None:
    cards = load().values()
    assert {card.family for card in cards} == set(FAMILIES)
    assert {card.goal for card in cards} == set(GOALS)
    assert {have for card in cards for have in card.have} == set(HAVE)


def test_bare_names_to_compare_with_are_ids() -> None:
    known = {*load(), *(entry["name"] for entry in index())}
    bare = {name for card in load().values() for name in card.compare if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)}
    assert len(bare) >= 20
    assert bare <= known


def test_texts_are_sentences() -> None:
    for card in load().values():
        for text in (card.summary, card.use_when, card.not_when, card.differences):
            assert text[0].isupper() or text[0] in "`k", card.key  # k-means begins a sentence
            assert text.endswith("."), card.key
            assert "  " not in text, card.key
        assert len(re.findall(r"\.(\s|$)", card.summary)) == 1, f"{card.key}: the summary is one sentence"
        assert len(card.summary) <= 190, card.key


def test_paper_names_the_nearest() -> None:
    assert paper("salun").module == "salun"
    with pytest.raises(RecipeError, match="Did you mean fisher-merging"):
        paper("fisher-mergin")


def _broken(folder: Path, text: str, name: str = "some-paper.toml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(WeftError) as error:
        load(folder)
    load.cache_clear()
    assert name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("year = 2016", "", "the field year is missing"),
        ("year = 2016", 'year = "2016"', "year must be of type int"),
        ("year = 2016", "year = 2016\ncolour = 1", "there is no field colour"),
        ("year = 2016", "year = 12", "year must be a year"),
        ("1607.06450", "1607", "arxiv must match"),
        ('family = "normalize"', 'family = "normalise"', "not in the vocabulary. Did you mean normalize"),
        ('module = "layer_norm"', 'module = "layer-norm"', "module must match"),
        ('want = ["train"', 'want = ["training"', "the first entry of want is 'training'"),
        ('have = ["a training loop"', 'have = ["a trainning loop"', "Did you mean a training loop"),
        ('compare = ["nn.LSTM', 'compare = ["RMS norm", "nn.LSTM', "compare says something twice"),
        ('gradients = "yes', 'gradient = "yes', "the field needs.gradients is missing"),
        ('gradients = "yes', 'gradients = " yes', "needs.gradients must be text on one line without spaces around it"),
        ("[needs]", "[need]", "the field needs is missing"),
        ("[needs]", "needs = 1\n[need]", "needs must be of type dict"),
        ('summary = "Normalise', 'summary = ["Normalise', "this is not TOML"),
        (re.search(r"keywords = .*", GOOD)[0], "keywords = []", "keywords is empty"),  # type: ignore[index]
        (re.search(r"keywords = .*", GOOD)[0], "keywords = [1]", "keywords must be text"),  # type: ignore[index]
    ],
)
def test_wrong_cards_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1
    assert message in _broken(tmp_path, GOOD.replace(old, new))


def test_two_cards_of_one_paper(tmp_path: Path) -> None:
    (tmp_path / "layer-norm.toml").write_text(GOOD, encoding="utf-8")
    assert "is also that of layer-norm-again.toml" in _broken(tmp_path, GOOD, "layer-norm-again.toml")
    assert "lower-case words" in _broken(tmp_path, GOOD, "Layer_Norm.toml")


def test_no_cards(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="there are no cards"):
        load(tmp_path)


_MEASURE = """
import sys, time
from weft.papers.catalogue import load
from weft.papers.search import search
start = time.process_time()
load()
loaded = time.process_time()
assert search("fine-tunes interfere")[0].paper.key == "pcb-merging"
print(loaded - start, time.process_time() - start)
from weft.papers import methods_command, papers_command
papers_command("model-soups"), papers_command("qantize"), papers_command(grade="planned"), methods_command()
heavy = {"torch", "numpy", "numba", "pydantic", "rich", "typer", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


def test_reading_and_searching_are_quick_and_light() -> None:
    # processor time of the best of three fresh interpreters, so that other work on the machine does not count
    runs = [subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    times = [[float(number) for number in run.stdout.split()] for run in runs]
    assert min(load for load, _ in times) < 0.060
    assert min(both for _, both in times) < 0.150
