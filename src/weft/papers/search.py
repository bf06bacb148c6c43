"""Find a card by problem words: weighted fields, synonyms, typing errors, facets.

    score = c · Σ_t w_t · idf_t · f_t / (k + f_t)      f_t = Σ_field weight · count_t / (1 − b + b · length / mean length)

over the terms t of the query (w_t = 1), their groups of synonyms (w_t below 1) and the nearest known words of terms that
no card has; c grows with the share of the query that a card answers. This is BM25 over fields (Robertson and Zaragoza,
2009).
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from weft.errors import RecipeError, did_you_mean
from weft.method import GOALS
from weft.papers.catalogue import FAMILIES, HAVE, Paper, load
from weft.papers.status import GRADES, Status, statuses
from weft.papers.vocabulary import groups, synonyms, terms

# ``not_when`` is left out: its words are problems that the method does not solve.
WEIGHTS = {
    "name": 2.5,
    "title": 2.0,
    "keywords": 3.0,
    "want": 3.0,
    "summary": 2.0,
    "use_when": 1.5,
    "have": 0.7,
    "data": 0.3,
    "compare": 0.3,
    "differences": 0.1,
}
_SATURATION, _LENGTH = 1.5, 0.4  # k and b of the formula
_SYNONYM, _PREFIX, _TYPO = 0.4, 0.7, 0.8  # what a group, a beginning of a word and a misspelt word count
_FLOOR, _FLOOR_OVERALL = 0.2, 0.1  # cards below this share of the best score, with and without facets, are left out
_SIMILAR, _SIMILAR_SHORT = 0.75, 0.82  # difflib's ratio from which a word (a short one) counts as misspelt

Facet = str | Sequence[str] | None


@dataclass(frozen=True)
class Hit:
    """A card that was found.

    Attributes:
        paper: the card.
        score: larger is better; comparable within one search only.
        nearest: nothing answers the search, and this card comes nearest.
    """

    paper: Paper
    score: float
    nearest: bool = False


def search(
    text: str = "",
    have: Facet = None,
    want: Facet = None,
    family: Facet = None,
    grade: Facet = None,
    limit: int | None = 10,
    *,
    status: Mapping[str, Status] | None = None,
) -> list[Hit]:
    """Cards for a problem, the best first.

    Args:
        text: problem words, names, an arXiv number; empty for all cards.
        have: what you start from; of several, a card must work from each. A part of an entry is enough.
        want: a goal (``combine``, ``shrink`` ...), or what exactly; of several, a card must serve each.
        family: the family in weft, or one of several.
        grade: ``planned``, ``lab``, ``checked`` or ``core``, or one of several.
        limit: how many cards at most, None for no limit.
        status: grades by key, those of the registry and of the committed studies if None.

    Returns:
        Hits; where nothing fits, the three nearest cards with ``nearest`` set.

    Raises:
        RecipeError: a facet has a value that does not exist.

    >>> [hit.paper.key for hit in search("avergae checkpoints of a sweep", limit=1)]
    ['model-soups']
    >>> [(hit.paper.family, hit.nearest) for hit in search("", want="shrink", family="merge")][:1]
    [('merge', False)]
    """
    papers = load()
    grades = {key: s.grade for key, s in (statuses() if status is None else status).items()} if grade else {}
    goals = dict.fromkeys([*GOALS, *(want for card in papers.values() for want in card.want)])
    # each test: the field, and the values of which a card must have one
    tests = [("have", meant) for meant in _resolve("have", have, HAVE)]
    tests += [("want", meant) for meant in _resolve("want", want, goals)]
    tests += [("family", set().union(*_resolve("family", family, FAMILIES)))] if family else []
    tests += [("grade", set().union(*_resolve("grade", grade, GRADES)))] if grade else []

    def passed(card: Paper) -> int:
        values = {"have": card.have, "want": card.want, "family": [card.family], "grade": [grades.get(card.key, "")]}
        return sum(not meant.isdisjoint(values[name]) for name, meant in tests)

    families = list(FAMILIES)
    scores = _scores(text) if text.strip() else dict.fromkeys(papers, 0.0)
    found = [key for key in scores if passed(papers[key]) == len(tests)]
    least = max(
        _FLOOR * max((scores[k] for k in found), default=0.0), _FLOOR_OVERALL * max(scores.values(), default=0.0)
    )
    hits = [Hit(papers[key], scores[key]) for key in found if scores[key] >= least]
    if hits:
        return sorted(hits, key=lambda h: (-h.score, families.index(h.paper.family), h.paper.key))[:limit]
    likeness = _likeness(text)
    order = sorted(papers, key=lambda key: (-scores.get(key, 0.0), -passed(papers[key]), -likeness[key], key))
    return [Hit(papers[key], scores.get(key, 0.0), nearest=True) for key in order[:3]][:limit]


def _resolve(name: str, facet: Facet, vocabulary: Iterable[str]) -> list[set[str]]:
    """For each value of a facet the entries of the vocabulary it means: itself, or those that contain its words."""
    known = list(vocabulary)
    result = []
    for value in [facet] if isinstance(facet, str) else facet or ():
        wanted = set(terms(value)) or {value}
        meant = {k for k in known if k == value.strip().lower()} or {k for k in known if wanted <= set(terms(k))}
        if not meant:
            raise RecipeError(f"There is no {name} {value!r} among the papers.{did_you_mean(value, known)}")
        result.append(meant)
    return result


@dataclass(frozen=True)
class _Index:
    frequency: dict[str, dict[str, float]]  # term -> key -> weighted frequency
    number: int

    def importance(self, term: str) -> float:
        found = len(self.frequency.get(term, ()))
        return math.log(1 + (self.number - found + 0.5) / (found + 0.5))


def _fields(card: Paper) -> dict[str, str]:
    return {
        "name": f"{card.key} {card.module} {card.family}",
        "title": card.title,
        "keywords": ". ".join(card.keywords),
        "want": ". ".join(card.want),
        "summary": card.summary,
        "use_when": card.use_when,
        "have": ". ".join(card.have),
        "data": card.needs.data,
        "compare": ". ".join(card.compare),
        "differences": card.differences,
    }


@cache
def _index() -> _Index:
    counts = {key: {f: Counter(terms(text)) for f, text in _fields(card).items()} for key, card in load().items()}
    mean = {f: sum(c[f].total() for c in counts.values()) / len(counts) for f in WEIGHTS}
    frequency: dict[str, dict[str, float]] = {}
    for key, by_field in counts.items():
        for f, counter in by_field.items():
            scale = WEIGHTS[f] / (1 - _LENGTH + _LENGTH * counter.total() / mean[f])
            for term, count in counter.items():
                for name in (term, *groups(term)):
                    row = frequency.setdefault(name, {})
                    row[key] = row.get(key, 0.0) + scale * count
    return _Index(frequency, len(counts))


def _scores(text: str) -> dict[str, float]:
    """Scores of the cards that answer at least one word; names and arXiv numbers come first."""
    index = _index()
    total: dict[str, float] = {}
    answered: dict[str, float] = {}
    mass = 0.0
    for word in sorted(set(terms(text))):  # sums in one order, whatever the order of the words
        options = _options(word, index)
        weight = max((w * index.importance(term) for term, w in options.items()), default=index.importance(word))
        mass += weight
        best: dict[str, float] = {}
        for term, w in options.items():
            for key, frequency in index.frequency[term].items():
                gain = w * index.importance(term) * frequency / (_SATURATION + frequency)
                best[key] = best.get(key, 0.0) + gain
        for key, gain in best.items():
            total[key] = total.get(key, 0.0) + gain
            answered[key] = answered.get(key, 0.0) + min(weight, gain)
    scores = {key: score * (0.25 + answered[key] / mass) for key, score in total.items()}
    top = max(scores.values(), default=0.0)
    numbers = set(re.findall(r"\d{4}\.\d{4,5}", text))
    wanted = re.sub(r"[\W_]+", "-", text.strip().lower())
    for key, card in load().items():
        if card.arxiv in numbers or wanted in (key, card.module.replace("_", "-")):
            scores[key] = scores.get(key, 0.0) + top + 1
    return scores


def _options(word: str, index: _Index) -> dict[str, float]:
    """The terms of the index that a word of the query stands for, with what each counts."""
    options = {word: 1.0} if word in index.frequency else {}
    options |= {group: _SYNONYM for group in groups(word) if group in index.frequency}
    if options or len(word) < 4:
        return options
    options = {term: _PREFIX for term in index.frequency if term.startswith(word)}
    likely = [t for t in index.frequency | synonyms() if t[0] == word[0] and abs(len(t) - len(word)) <= 2]
    for term in difflib.get_close_matches(word, likely, n=3, cutoff=_SIMILAR if len(word) > 5 else _SIMILAR_SHORT):
        for name, value in ((term, 1.0), *((group, _SYNONYM) for group in groups(term))):
            if name in index.frequency:
                options[name] = max(options.get(name, 0.0), _TYPO * value)
    return options


def _likeness(text: str) -> dict[str, float]:
    """How many of the letter triples of a text each card's names have, between 0 and 1."""

    def triples(line: str) -> set[str]:
        line = f"  {line.lower()} "
        return {line[i : i + 3] for i in range(len(line) - 2)}

    wanted = triples(text)
    names = {k: " ".join((k, c.title, *c.keywords, *c.want)) for k, c in load().items()}
    return {key: len(wanted & triples(line)) / len(wanted) for key, line in names.items()}
