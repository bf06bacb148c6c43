"""Coordinate descent over groups: each in turn takes the best order that the others leave it, as a linear assignment.

Units that lie within others are matched together with these: for every pair of outer units (one head of A, one of B) the
groups inside are matched by the same descent, and what they reach is the pair's entry in the outer cost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weft.errors import MissingDependencyError
from weft.merge.weight_matching.blocks import Block, Units, cost, moved

Step = dict[str, np.ndarray]
_GAIN = 1e-13  # of Σ |A||B|: what rounding in float64 cannot make


@dataclass
class Clock:
    """Seconds in the assignment solver, and how often it ran."""

    seconds: float = 0.0
    calls: int = 0


@dataclass
class Descent:
    """The state of one descent: A is fixed, B of the blocks is permuted as it goes.

    Attributes:
        blocks: parts of both models; their ``b`` are replaced.
        groups: each after those that it lies within.
        clock: counts the solver.
        held: outer groups that keep their order; what lies within them may move.
        history: the objective Σ ⟨A, B⟩ at the start and after each step that raised it.
        steps: these steps, each relative to the one before.
        sweeps: over all groups; the last of a converged descent found nothing.
        converged: whether no group can be improved.
    """

    blocks: list[Block]
    groups: Sequence[Units]
    clock: Clock
    held: frozenset[str] = frozenset()
    history: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    sweeps: int = 0
    converged: bool = False

    def __post_init__(self) -> None:
        self.history.append(float(sum(float(block.inner()) for block in self.blocks)))
        self._least = _GAIN * sum(float(block.a.double().norm() * block.b.double().norm()) for block in self.blocks)

    def run(self, max_sweeps: int, generator: np.random.Generator | None = None) -> Descent:
        """Sweep over the outer groups, in random order if a generator is given, until none can be improved."""
        outer = [units for units in self.groups if not units.within]
        inside = {u.name: [g for g in self.groups if g.within and g.within[0] == u.name] for u in outer}
        parts = {
            u.name: [b for b in self.blocks if {u.name, *(g.name for g in inside[u.name])} & {*b.names}] for u in outer
        }
        settled: set[str] = set()
        while self.sweeps < max_sweeps and not self.converged:
            self.sweeps += 1
            order = generator.permutation(len(outer)) if generator is not None else range(len(outer))
            for units in (outer[int(i)] for i in order):
                name = units.name
                if name in settled:  # nothing that it depends on has moved since
                    continue
                settled.add(name)
                step = self._best(units, inside[name], parts[name])
                if not step or not self._take(parts[name], step):
                    continue
                beside = {n for block in parts[name] for n in block.names}
                settled -= beside - {name}
                if any(block.names.count(name) > 1 for block in parts[name]) or inside[name]:
                    settled.discard(name)  # one step is not the optimum of a group that meets itself
            self.converged = len(settled) == len(outer)
        return self

    def _take(self, parts: Sequence[Block], step: Step) -> bool:
        """Permute B if that raises the objective."""
        tensors = list(moved(parts, self.groups, step))
        gain = 0.0
        for block, tensor in zip(parts, tensors):
            gain += float((block.a.double() * (tensor.double() - block.b.double())).sum())
        if not gain > self._least:
            return False
        for block, tensor in zip(parts, tensors):
            block.b = tensor
        self.history.append(self.history[-1] + gain)
        self.steps.append(step)
        return True

    def _best(self, units: Units, inside: Sequence[Units], parts: Sequence[Block]) -> Step:
        """The best order of one outer group and of all that lies within it, given the others."""
        if not inside and units.name in self.held:
            return {}
        if not inside:
            order = self._assign(cost(parts, units.name, units.size))
            return {} if (order == np.arange(units.size)).all() else {units.name: order}
        inner = [Units(g.name, g.size, g.within[1:]) for g in inside]
        held = units.name in self.held
        table = np.full((units.size, units.size), -np.inf)
        found: dict[tuple[int, int], list[Step]] = {}
        for i in range(units.size):
            for j in (i,) if held else range(units.size):
                pair = [_slice(block, units.name, i, j) for block in parts]
                descent = Descent(pair, inner, self.clock, self.held).run(100)
                table[i, j] = descent.history[-1]
                found[i, j] = descent.steps
        order = np.arange(units.size) if held else self._assign(table)
        step: Step = {units.name: order}
        shapes = {g.name: tuple(u.size for n in g.within for u in self.groups if u.name == n) for g in inside}
        for g in inside:
            rows = np.broadcast_to(np.arange(g.size), (*shapes[g.name], g.size)).copy()
            for i, j in enumerate(order):
                rows[j] = _composed(g.name, inner, found[i, int(j)], rows[j])
            step[g.name] = rows
        return step

    def _assign(self, table: np.ndarray) -> np.ndarray:
        began = time.perf_counter()
        order = assign(table)
        self.clock.seconds += time.perf_counter() - began
        self.clock.calls += 1
        return order


def solver() -> Any:
    """scipy's assignment solver.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingDependencyError("Matching units needs scipy: pip install weft[science].") from None
    return linear_sum_assignment


def assign(table: np.ndarray) -> np.ndarray:
    """The order p with the largest Σ_i table[i, p[i]]; the identity where none is larger: (n, n) -> (n,).

    >>> assign(np.array([[1.0, 5.0], [4.0, 2.0]])).tolist()
    [1, 0]
    """
    stay = np.arange(len(table))
    order: np.ndarray = solver()(table, maximize=True)[1]
    return order if table[stay, order].sum() > np.trace(table) else stay


def _slice(block: Block, group: str, i: int, j: int) -> Block:
    dim = block.names.index(group)
    names = block.names[:dim] + block.names[dim + 1 :]
    return Block(block.a.select(dim, i), block.b.select(dim, j), names)


def _composed(name: str, groups: Sequence[Units], steps: Sequence[Step], rows: np.ndarray) -> np.ndarray:
    """One permutation of a group for several steps, in the units around it as they were before all of them."""
    units = next(u for u in groups if u.name == name)
    parents = [next(u for u in groups if u.name == p) for p in units.within]
    # where each unit around it, by its first place, stands now
    grid = list(np.indices(rows.shape[:-1])) if parents else []
    result = rows
    for step in steps:
        if name in step:
            result = np.take_along_axis(result, step[name][tuple(grid)] if parents else step[name], -1)
        before = dict(zip(units.within, grid))
        for k, parent in enumerate(parents):
            if parent.name in step:
                back = np.argsort(step[parent.name], -1)
                grid[k] = back[(*(before[p] for p in parent.within), grid[k])]
    return result
