"""The cards: one TOML file a paper in ``cards/``, read once and checked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from weft.errors import RecipeError, WeftError, did_you_mean
from weft.method import GOALS

CARDS = Path(__file__).with_name("cards")

FAMILIES = {
    "merge": "several models in, one model out",
    "edit": "change what a trained model does, in its weights",
    "quantize": "fewer bits for each weight",
    "prune": "fewer weights",
    "adapt": "fine-tune by a few new parameters",
    "init": "where the weights start",
    "normalize": "reparametrise weights and activations",
    "share": "many networks in one set of weights",
    "grow": "make a network from others",
    "weigh": "weights on samples, tokens and losses",
    "robust": "hold under attack, with proof or without",
    "continual": "one task after another",
    "federate": "many clients, one model",
    "optim": "the step itself",
    "data": "what to train on",
    "predict": "combine what models say",
    "measure": "look before and after",
}

HAVE = (
    "one trained model",
    "a base model and a fine-tune",
    "several fine-tunes of one model",
    "several unrelated models",
    "predictions of several models",
    "a mixture of experts",
    "a supernet",
    "nothing yet (training from scratch)",
    "a training loop",
    "a little calibration data",
    "labelled data",
    "unlabelled data",
    "preference data",
    "a data set to choose from",
    "a stream of tasks",
    "many clients",
    "a graph",
    "a table",
)


@dataclass(frozen=True)
class Needs:
    """What a method asks for.

    Attributes:
        data: which data, and whether with labels.
        gradients: whether backpropagation is needed, and through what.
        memory: what has to be in memory at once.
    """

    data: str
    gradients: str
    memory: str


@dataclass(frozen=True)
class Paper:
    """One card.

    Attributes:
        key: the name of its file, and its name everywhere.
        title: the paper's title, as published.
        year: when it came out, at its venue where it has one.
        arxiv: its number there, empty for a paper that has none in the catalogue.
        family: the package under ``weft`` that holds the method, one of ``FAMILIES``.
        module: the method's module in it.
        summary: what it does, one sentence for a practitioner.
        use_when: the situation in which it helps.
        not_when: the situation in which it does not.
        differences: how weft's version differs from the paper and its code, and why.
        compare: what to hold it against; a bare name is the key of a card or a method's id.
        have: what a user starts from, from ``HAVE``.
        want: the goal, one of ``weft.method.GOALS``, then what exactly, in a few words each.
        keywords: the field's words for it.
        needs: data, gradients and memory.
    """

    key: str
    title: str
    year: int
    arxiv: str
    family: str
    module: str
    summary: str
    use_when: str
    not_when: str
    differences: str
    compare: tuple[str, ...]
    have: tuple[str, ...]
    want: tuple[str, ...]
    keywords: tuple[str, ...]
    needs: Needs

    @property
    def goal(self) -> str:
        """What a user wants with it, one of ``weft.method.GOALS``."""
        return self.want[0]

    @property
    def path(self) -> str:
        """Its module in Python."""
        return f"weft.{self.family}.{self.module}"

    @property
    def url(self) -> str:
        """Its page on arXiv, empty where the card has no number."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


@cache
def load(folder: Path = CARDS) -> Mapping[str, Paper]:
    """All cards by key, in alphabetical order; read and checked on the first call.

    Raises:
        WeftError: a card is wrong; the message names its file.

    >>> load()["model-soups"].goal
    'combine'
    """
    papers: dict[str, Paper] = {}
    owners: dict[tuple[str, str], str] = {}
    for file in sorted(folder.glob("*.toml")):
        card = _read(file)
        for label, value in (("title", card.title), ("arxiv", card.arxiv), ("module", card.path)):
            if value and owners.setdefault((label, value), file.name) != file.name:
                raise WeftError(
                    f"{file}: {label} {value!r} is also that of {owners[label, value]}; one of them is wrong."
                )
        papers[card.key] = card
    if not papers:
        raise WeftError(f"{folder}: there are no cards (*.toml); is the installation complete?")
    return MappingProxyType(papers)


def paper(key: str) -> Paper:
    """The card called ``key``.

    Raises:
        RecipeError: there is none; the message names the nearest.

    >>> paper("model-soup")
    Traceback (most recent call last):
    weft.errors.RecipeError: There is no paper 'model-soup'. Did you mean model-soups?
    """
    if key not in load():
        raise RecipeError(f"There is no paper {key!r}.{did_you_mean(key, load())}")
    return load()[key]


def _read(file: Path) -> Paper:
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not TOML
        raise WeftError(f"{file}: this is not TOML: {error}.") from error
    problem = _problem(values, file.stem)
    if problem:
        raise WeftError(f"{file}: {problem}.")
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Paper(**{**values, **tuples, "key": file.stem, "needs": Needs(**values["needs"])})


_FIELDS = {f.name: f.type for f in fields(Paper) if f.name != "key"}
_NEEDS = {f.name: f.type for f in fields(Needs)}
_TYPES = {"str": str, "int": int, "tuple[str, ...]": list, "Needs": dict}
_PATTERNS = {"arxiv": r"(\d{4}\.\d{4,5})?", "module": r"[a-z][a-z0-9_]*"}


def _problem(values: dict[str, Any], key: str) -> str:
    """What is wrong with a card, empty if nothing is."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key):
        return "its name must be lower-case words joined by hyphens"
    for table, expected, where in ((values, _FIELDS, ""), (values.get("needs"), _NEEDS, "needs.")):
        if not isinstance(table, dict):
            return "the table [needs] is missing"
        for name in [*expected, *table]:
            if name not in table:
                return f"the field {where}{name} is missing"
            if name not in expected:
                return f"there is no field {where}{name}.{did_you_mean(name, expected).rstrip('.')}"
            kind = _TYPES[str(expected[name])]
            value = table[name]
            if type(value) is not kind:
                return f"{where}{name} must be of type {kind.__name__}, got {value!r}"
            if not value and name != "arxiv":
                return f"{where}{name} is empty"
            for text in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
                if not isinstance(text, str) or text != text.strip() or "\n" in text:
                    return f"{where}{name} must be text on one line without spaces around it, got {text!r}"
            if isinstance(value, list) and len(set(value)) < len(value):
                return f"{where}{name} says something twice: {value!r}"
    for name, pattern in _PATTERNS.items():
        if not re.fullmatch(pattern, values[name]):
            return f"{name} must match {pattern}, got {values[name]!r}"
    if not 1950 <= values["year"] <= 2100:
        return f"year must be a year, got {values['year']}"
    vocabularies = {"family": FAMILIES, "have": HAVE, "want": GOALS}
    for name, vocabulary in vocabularies.items():
        found = values[name]
        for text in found[:1] if name == "want" else found if name == "have" else [found]:
            if text not in vocabulary:
                label = "the first entry of want" if name == "want" else name
                return (
                    f"{label} is {text!r}, which is not in the vocabulary.{did_you_mean(text, vocabulary).rstrip('.')}"
                )
    return ""
