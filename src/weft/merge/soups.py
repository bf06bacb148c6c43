"""Model soups: average all fine-tunes of one model (uniform), or only those that raise a score (greedy).

Model soups, Wortsman et al., arXiv:2203.05482 (2022).

    uniform   W = (1/K) Σᵢ Wᵢ                                       Wᵢ (any shape), K models
    greedy    start from the best model; in order of their own scores, add each other model to the average if the
              score of the average rises

Differences from the paper and its code: a model is added when the score strictly rises, as in the authors' code; the
paper also accepts an equal score (``accept_equal``). Every average is taken anew in float32 from its members, so it
does not drift as a running mean in bfloat16 does, and it is what ``uniform_soup`` of the members writes. A score that
is NaN ranks last and is never accepted. Tensors that are not floating point (counters) come from the first member.
Complexity: one pass for an average; greedy takes K scores of single models and K − 1 of averages, and holds one
average beside the models. Re-implemented from the equations (official code: MIT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from weft.checkpoint.memory import from_mapping
from weft.engine.chunks import Chunk
from weft.engine.merging import MergeMethod, merge_tensors
from weft.errors import RecipeError
from weft.merge.linear import weighted_sum
from weft.method import parameter

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class UniformSoup:
    """Configuration of :func:`uniform_soup`: there is nothing to choose."""


@dataclass(frozen=True)
class GreedySoup:
    """Configuration of :func:`greedy_soup`."""

    accept_equal: bool = parameter(False, "add a model to the soup when the score stays equal, too")


@dataclass(frozen=True)
class Step(Generic[Name]):
    """One candidate of a greedy selection: its name, the score of the soup with it, and whether it stayed."""

    candidate: Name
    score: float
    accepted: bool


@dataclass(frozen=True)
class Selection(Generic[Name]):
    """What a greedy selection chose.

    Attributes:
        members: names in the order in which they were added.
        score: of the members together.
        history: every step, in order; the scores of the accepted ones never fall.
        order_scores: what the candidates were sorted by.
    """

    members: tuple[Name, ...]
    score: float
    history: tuple[Step[Name], ...]
    order_scores: dict[Name, float]


@dataclass(frozen=True)
class Soup(Selection[Name]):
    """A selection with the average of its members, in ``state``."""

    state: dict[str, Any]


def uniform_soup(tensors: Sequence[Any]) -> Any:
    """Plain average of tensors of one shape.

    Args:
        tensors: one tensor (torch or numpy, any shape) or one state dict for each model.

    Returns:
        The average, in the form and dtype of the first tensor.

    Raises:
        ShapeError: shapes differ.

    Source: arXiv:2203.05482, section 2.

    >>> import numpy as np
    >>> from weft.merge.soups import uniform_soup
    >>> uniform_soup([np.float32([0, 2]), np.float32([1, 4])])
    array([0.5, 3. ], dtype=float32)
    """
    return merge_tensors(METHODS[0], tensors, UniformSoup())


def select_greedily(
    candidates: Sequence[Name],
    score_of: Callable[[Sequence[Name]], float],
    *,
    order_scores: Mapping[Name, float] | None = None,
    accept_equal: bool = False,
) -> Selection[Name]:
    """Choose the candidates whose average scores best, one at a time.

    Args:
        candidates: names, each once.
        score_of: score of the average of some candidates; higher is better.
        order_scores: scores to sort the candidates by, where they are known; without them ``score_of`` is asked for
            each candidate alone. Equal scores keep the given order.
        accept_equal: add a candidate when the score stays equal, too.

    Returns:
        The selection; its score is at least that of its first member.

    Raises:
        RecipeError: no candidates, a name twice, a candidate without a score, or no candidate with a number as score.

    Source: arXiv:2203.05482, recipe 1.

    >>> values = {"a": 1.0, "b": 4.0, "c": 3.0}
    >>> chosen = select_greedily(list(values), lambda names: -abs(sum(values[n] for n in names) / len(names) - 3.2))
    >>> chosen.members, [(step.candidate, step.accepted) for step in chosen.history]
    (('c',), [('c', True), ('b', False), ('a', False)])
    """
    if not candidates:
        raise RecipeError("A greedy soup needs at least one candidate; the list is empty.")
    if len(set(candidates)) != len(candidates):
        raise RecipeError("A greedy soup needs different candidates; a name stands twice in the list.")
    if order_scores is None:
        scores = {name: float(score_of((name,))) for name in candidates}
    else:
        missing = [name for name in candidates if name not in order_scores]
        if missing:
            raise RecipeError(f"order_scores must hold every candidate; {missing[0]!r} has no score in it.")
        scores = {name: float(order_scores[name]) for name in candidates}
    ranked = sorted(candidates, key=lambda name: math.inf if math.isnan(scores[name]) else -scores[name])
    first = ranked[0]
    # scores to sort by may be of another kind, so the start is then scored like everything that follows
    best = scores[first] if order_scores is None else float(score_of((first,)))
    if math.isnan(best):
        raise RecipeError(f"The score of the best candidate, {first!r}, is NaN; the scorer must return a number.")
    members, history = [first], [Step(first, best, True)]
    for name in ranked[1:]:
        score = float(score_of((*members, name)))
        accepted = score > best or (accept_equal and score == best)
        history.append(Step(name, score, accepted))
        if accepted:
            members.append(name)
            best = score
    return Selection(tuple(members), best, tuple(history), scores)


def greedy_soup(
    models: Mapping[Name, Mapping[str, Any]] | Sequence[Mapping[str, Any]],
    score: Callable[[dict[str, Any]], float],
    *,
    accept_equal: bool = False,
    order_scores: Mapping[Name, float] | None = None,
    recalibrate: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Soup[Name]:
    """Average only those models that raise a score on held-out data.

    Args:
        models: state dicts by name, or a list of state dicts, whose names are then 0, 1, 2 …
        score: score of a state dict; higher is better. Use data that no model was trained on and that is not the
            final test set.
        accept_equal: add a model when the score stays equal, too.
        order_scores: scores to sort the models by, where they are known.
        recalibrate: applied to every average before it is scored and to the one returned, for example to estimate
            batch-norm statistics again; must give the same result each time.

    Returns:
        The members, the scores, and the average of the members.

    Raises:
        RecipeError: see :func:`select_greedily`. ShapeError: names or shapes differ.

    Source: arXiv:2203.05482, recipe 1.

    >>> import numpy as np
    >>> from weft.merge.soups import greedy_soup
    >>> models = {name: {"w": np.float32([value])} for name, value in {"a": 1, "b": 4, "c": 2}.items()}
    >>> soup = greedy_soup(models, lambda state: -abs(float(state["w"][0]) - 2.9))
    >>> soup.members, soup.state["w"]
    (('c', 'b'), array([3.], dtype=float32))
    """
    named: dict[Any, Mapping[str, Any]] = dict(models.items() if isinstance(models, Mapping) else enumerate(models))

    def mix(members: Sequence[Name]) -> dict[str, Any]:
        state = _average([named[name] for name in members])
        return recalibrate(state) if recalibrate else state

    chosen = select_greedily(
        list(named), lambda names: score(mix(names)), order_scores=order_scores, accept_equal=accept_equal
    )
    return Soup(chosen.members, chosen.score, chosen.history, chosen.order_scores, mix(chosen.members))


def _average(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = from_mapping(states[0])
    fixed = {name for name, tensor in first.items() if not tensor.dtype.floating}
    floating = [{name: value for name, value in state.items() if name not in fixed} for state in states]
    merged = merge_tensors(METHODS[0], floating, UniformSoup())
    return {name: value if name in fixed else merged[name] for name, value in states[0].items()}


def _combine(chunk: Chunk, config: UniformSoup | GreedySoup, state: None, out: np.ndarray) -> None:
    models = len(chunk.tensors)
    weighted_sum(chunk.tensors, np.full(models, 1 / models, np.float32), out)


METHODS = (
    MergeMethod(
        name="uniform_soup",
        family="merge",
        config=UniformSoup,
        summary="Plain average of fine-tunes of one model.",
        goal="combine",
        paper="model-soups",
        combine=_combine,
        function=uniform_soup,
        checked_by=("closed form", "brute force"),
    ),
    MergeMethod(
        name="greedy_soup",
        family="merge",
        config=GreedySoup,
        summary="Average only those fine-tunes that raise a score on held-out data.",
        goal="combine",
        paper="model-soups",
        needs="a scorer",
        combine=_combine,
        function=greedy_soup,
        checked_by=("brute force",),
    ),
)
