"""Which layer gets how many bits: the least total error that fits into a budget of bytes.

    minimise  Σₗ error(l, cₗ)      subject to  Σₗ bytes(l, cₗ) ≤ budget,      one candidate cₗ for each layer l

Layers are taken one after another. Of all sums of bytes and errors so far, those stay that no other one beats in both
(the Pareto front of the partial sums): no best choice for any budget begins with a sum that is dropped, so what remains
after the last layer is the exact answer for every budget at once. Bytes are whole numbers and layers of a network have few
shapes, so sums coincide and fronts stay small: some thousands of points for a hundred layers.

Where a front is larger than ``limit`` points, only the one with the least error is kept in every ``grain`` bytes (and the
smallest of all). Bytes are still counted exactly, so that no budget is exceeded, and the result is no worse than the exact
one for ``budget − steps · grain``, where ``steps`` is how often that was done (:attr:`Frontier.slack` is the product, 0
where the answer is exact).

Layers that a serving engine fuses into one (query, key and value; gate and up) must have one choice together: they are one
layer with summed bytes and errors. Complexity: O(layers · candidates · front · log(candidates · front)).
The problem is the multiple-choice knapsack; dynamic programming with dominance is its standard exact solution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from weft.errors import RecipeError, did_you_mean

LIMIT = 100_000  # points of a front: a few megabytes a layer at most
Curve = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Allocation:
    """A choice for every layer.

    Attributes:
        choices: the candidate's label, by layer.
        nbytes: of all layers together.
        error: of all layers together.
        bits_per_weight: of all layers together; None where sizes are not known.
    """

    choices: dict[str, str]
    nbytes: int
    error: float
    bits_per_weight: float | None = None


class _Unit(NamedTuple):
    """Layers that choose together: labels with their bytes and errors, by rising bytes and falling errors."""

    layers: tuple[str, ...]
    labels: list[str]
    nbytes: np.ndarray
    errors: np.ndarray


class _Step(NamedTuple):
    """For each point of a front: which point of the front before it comes from, and with which candidate."""

    before: np.ndarray
    candidate: np.ndarray


class Frontier:
    """The best choice for every budget; see :func:`frontier`.

    Attributes:
        nbytes: (points,) rising.
        errors: (points,) falling: the least total error with so many bytes.
        slack: bytes by which the budget is to be lowered for the exact answer to be no better; 0 if this is exact.
    """

    def __init__(
        self, nbytes: np.ndarray, errors: np.ndarray, slack: int, units: list[_Unit], steps: list[_Step], size: int
    ):
        self.nbytes, self.errors, self.slack = nbytes, errors, slack
        self._units, self._steps, self._size = units, steps, size

    def __len__(self) -> int:
        return len(self.nbytes)

    def best(self, budget: float) -> Allocation:
        """The choices with the least error of those of at most so many bytes.

        Raises:
            RecipeError: not even the smallest candidates fit.
        """
        if math.isnan(budget):
            raise RecipeError("A budget is a number of bytes, got nan.")
        point = int(np.searchsorted(self.nbytes, budget, side="right")) - 1
        if point < 0:
            raise RecipeError(_too_small(budget, int(self.nbytes[0]), self._size))
        choices: dict[str, str] = {}
        at = point
        for unit, step in zip(reversed(self._units), reversed(self._steps)):
            label = unit.labels[int(step.candidate[at])]
            choices |= dict.fromkeys(unit.layers, label)
            at = int(step.before[at])
        order = [name for unit in self._units for name in unit.layers]
        nbytes = int(self.nbytes[point])
        return Allocation(
            {name: choices[name] for name in order}, nbytes, float(self.errors[point]),
            8 * nbytes / self._size if self._size else None,
        )  # fmt: skip

    def points(self, most: int = 200) -> list[tuple[int, float]]:
        """At most so many of the points (bytes, error), first and last among them, evenly by bytes: for a plot."""
        if len(self) <= most:
            chosen = np.arange(len(self))
        else:
            wanted = np.linspace(self.nbytes[0], self.nbytes[-1], most)
            chosen = np.unique(np.searchsorted(self.nbytes, wanted, side="right") - 1)
        return [(int(self.nbytes[i]), float(self.errors[i])) for i in chosen]


def allocate_bits(
    curves: Mapping[str, Curve],
    sizes: Mapping[str, int] | None,
    budget: float,
    *,
    together: Iterable[Sequence[str]] = (),
    limit: int = LIMIT,
) -> Allocation:
    """Choose a candidate for every layer: the least total error within a budget.

    Args:
        curves: for each layer, candidates by label: (bits per weight, error), scales included in the bits
            (:attr:`weft.packed.Packed.bits_per_weight`). Errors of one layer are of any unit that errors of the others
            have too. Candidates whose error is NaN or infinite are not taken.
        sizes: weights of each layer; None: the first number of a candidate is bytes.
        budget: bytes of all layers.
        together: groups of layers that must have the same candidate.
        limit: points of a front; see the module.

    Raises:
        RecipeError: nothing fits (the message says how little would), a layer has no candidate, or groups do not.

    >>> curves = {"a": {"2": (2, 9.0), "4": (4, 1.0)}, "b": {"2": (2, 5.0), "4": (4, 2.0)}}
    >>> allocate_bits(curves, {"a": 8, "b": 8}, 6).choices
    {'a': '4', 'b': '2'}
    >>> allocate_bits(curves, {"a": 8, "b": 8}, 3)
    Traceback (most recent call last):
    weft.errors.RecipeError: No choice fits into 3 bytes (1.5 bits per weight): the least possible is 4 bytes (2 bits per weight)...
    """
    return frontier(curves, sizes, together=together, budget=budget, limit=limit).best(budget)


def frontier(
    curves: Mapping[str, Curve],
    sizes: Mapping[str, int] | None = None,
    *,
    together: Iterable[Sequence[str]] = (),
    budget: float | None = None,
    limit: int = LIMIT,
    weights: int = 0,
) -> Frontier:
    """The least total error for every number of bytes.

    Args:
        curves, sizes, together, limit: see :func:`allocate_bits`.
        budget: the largest that is of interest; None: all.
        weights: number of weights of all layers, where ``sizes`` do not say it: for bits per weight only.

    Raises:
        RecipeError: as of :func:`allocate_bits`.

    >>> front = frontier({"a": {"2": (1, 9.0), "4": (2, 1.0)}, "b": {"2": (1, 5.0), "4": (2, 2.0)}})
    >>> front.points()
    [(2, 14.0), (3, 6.0), (4, 3.0)]
    """
    if limit < 2:
        raise RecipeError(f"A front needs at least 2 points, got limit={limit!r}.")
    size = sum(sizes[name] for name in curves if name in sizes) if sizes else weights
    units = _units(curves, sizes, list(together))
    least = np.cumsum([0, *(int(u.nbytes[0]) for u in reversed(units))])[::-1]  # of the layers from each on
    most = sum(int(u.nbytes[-1]) for u in units)
    end = most if budget is None else min(most, budget)
    if end < least[0]:
        raise RecipeError(_too_small(end, int(least[0]), size))
    grain = max(1, math.ceil((int(end) - int(least[0]) + 1) / (limit - 1)))
    nbytes, errors = np.zeros(1, np.int64), np.zeros(1)
    steps, thinned = [], 0
    for unit, rest in zip(units, least[1:]):
        sums = (nbytes[:, None] + unit.nbytes).ravel()  # (front · candidates,)
        totals = (errors[:, None] + unit.errors).ravel()
        index = np.flatnonzero(sums + rest <= end)
        index = index[np.lexsort((totals[index], sums[index]))]
        best = np.minimum.accumulate(totals[index])
        index = index[np.r_[True, totals[index][1:] < best[:-1]]]
        if len(index) > limit:
            cell = sums[index] // grain
            index = index[np.r_[True, cell[1:-1] != cell[2:], True]]  # the last of each cell has its least error
            thinned += 1
        nbytes, errors = sums[index], totals[index]
        steps.append(_Step((index // len(unit.labels)).astype(np.int32), (index % len(unit.labels)).astype(np.int32)))
    return Frontier(nbytes, errors, thinned * grain, units, steps, size)


def _units(curves: Mapping[str, Curve], sizes: Mapping[str, int] | None, together: list[Sequence[str]]) -> list[_Unit]:
    """Layers, or groups of them, with candidates that are worth choosing, in the order of the curves."""
    if not curves:
        raise RecipeError("There is nothing to choose: no layer has an error curve.")
    group_of: dict[str, tuple[str, ...]] = {}
    for group in together:
        for name in group:
            if name not in curves:
                raise RecipeError(
                    f"{name!r} is to choose together with others and has no curve.{did_you_mean(name, curves)}"
                )
            if name in group_of:
                raise RecipeError(f"{name!r} is in two groups of layers that choose together; give one.")
            group_of[name] = tuple(group)
    made = []
    for group in dict.fromkeys(group_of.get(name, (name,)) for name in curves):
        labels = [label for label in curves[group[0]] if all(_is_usable(curves[n].get(label)) for n in group)]
        if not labels:
            raise RecipeError(
                f"{', '.join(group)}: no candidate has a finite error{' for all of them' if len(group) > 1 else ''}. Give one "
                "that works for every layer, such as 8 bits, or leave the layer out."
            )
        nbytes = np.array([sum(_bytes(n, curves[n][label][0], sizes) for n in group) for label in labels])
        errors = np.array([math.fsum(curves[n][label][1] for n in group) for label in labels])
        order = np.lexsort((errors, nbytes))
        keep = [i for at, i in enumerate(order) if at == 0 or errors[i] < errors[order[:at]].min()]
        made.append(_Unit(group, [labels[i] for i in keep], nbytes[keep].astype(np.int64), errors[keep]))
    return made


def _is_usable(candidate: tuple[float, float] | None) -> bool:
    return candidate is not None and math.isfinite(candidate[1]) and math.isfinite(candidate[0])


def _bytes(name: str, amount: float, sizes: Mapping[str, int] | None) -> int:
    """Whole bytes, rounded up."""
    if amount < 0:
        raise RecipeError(f"{name}: a candidate has a negative size, {amount!r}.")
    if sizes is None:
        return math.ceil(amount)
    if name not in sizes:
        raise RecipeError(f"{name}: its number of weights is not given.{did_you_mean(name, sizes)}")
    return math.ceil(amount * sizes[name] / 8)


def _too_small(budget: float, least: int, size: int) -> str:
    def written(nbytes: float) -> str:
        per_weight = f" ({8 * nbytes / size:.4g} bits per weight)" if size else ""
        return f"{nbytes:,.0f} bytes{per_weight}"

    return (
        f"No choice fits into {written(budget)}: the least possible is {written(least)}, every layer with its smallest "
        "candidate. Give a larger budget, or candidates of fewer bits."
    )
