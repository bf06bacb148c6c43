"""Match the units of two models by their weights alone, and give back a model that can be averaged with the other."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.merge.weight_matching.blocks import Block, Units, blocks_of, moved, state_of
from weft.merge.weight_matching.descent import Clock, Descent, solver
from weft.merge.weight_matching.methods import WeightMatching
from weft.method import configure
from weft.symmetry import Group, Symmetry, find_symmetry

Permutations = Mapping[str, Any]


@dataclass(frozen=True)
class Matching:
    """What a matching found.

    Attributes:
        permutations: for ``symmetry.apply``; one array for each group.
        objective: Σ ⟨A, π(B)⟩ over all tensors that permute (for activations, the sum of correlations).
        history: the objective at the start and after every step that raised it, of the restart that was kept.
        sweeps: over all groups.
        converged: whether the last sweep found no better order for any group.
        restart: which start was kept, 0 being the given one.
        unmatched: groups that stay in their order because nothing is known of them.
        seconds, assignment_seconds: of all restarts together, in total and in the assignment solver.
        assignments: how often the solver ran.
    """

    permutations: dict[str, np.ndarray]
    objective: float
    history: tuple[float, ...]
    sweeps: int
    converged: bool
    restart: int
    unmatched: tuple[str, ...]
    seconds: float
    assignment_seconds: float
    assignments: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self.__dict__, "permutations": {n: p.tolist() for n, p in self.permutations.items()}}

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict())


def match_weights(
    reference: Any,
    model: Any,
    symmetry: Symmetry,
    *,
    start: Permutations | None = None,
    groups: Sequence[str] | None = None,
    restarts: int = 1,
    max_sweeps: int = 100,
    seed: int = 0,
) -> Matching:
    """Find the order of a model's units in which its weights are nearest to a reference.

    Args:
        reference: A, which stays: a state dict (torch or numpy) or a module.
        model: B, of the same shapes.
        symmetry: of both, from ``weft.symmetry.find_symmetry``.
        start: where the first descent starts; the given order if None.
        groups: names of those to match; the others stay as in ``start``.
        restarts: number of descents; all but the first start from a random order. The best is kept.
        max_sweeps: over all groups, for each descent.
        seed: of the order of groups in a sweep, and of random starts.

    Returns:
        A :class:`Matching`; ``symmetry.apply(model, matching.permutations)`` is B in A's order.

    Raises:
        RecipeError: an unknown group, a wrong start, fewer than one descent or sweep. ShapeError: the models differ.
        NonFiniteError: NaN or infinity. MissingDependencyError: scipy is not installed.

    Source: Ainsworth et al., arXiv:2209.04836, section 3.2 and algorithm 1.

    >>> import torch
    >>> from torch import nn
    >>> a = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> symmetry = find_symmetry(a, torch.zeros(5, 3))
    >>> mixed = symmetry.random(torch.Generator().manual_seed(0))
    >>> b = symmetry.apply(a.state_dict(), mixed)
    >>> found = match_weights(a, b, symmetry)
    >>> all(torch.equal(v, a.state_dict()[n]) for n, v in symmetry.apply(b, found.permutations).items())
    True
    """
    configure(WeightMatching, {"restarts": restarts, "max_sweeps": max_sweeps}, "match_weights")
    a, b = state_of(reference, symmetry, "The reference"), state_of(model, symmetry, "The model")
    return descend(
        blocks_of(symmetry, a, b),
        symmetry,
        start=start,
        groups=groups,
        restarts=restarts,
        max_sweeps=max_sweeps,
        seed=seed,
    )


def descend(
    blocks: Sequence[Block],
    symmetry: Symmetry,
    *,
    start: Permutations | None = None,
    groups: Sequence[str] | None = None,
    restarts: int = 1,
    max_sweeps: int = 100,
    seed: int = 0,
) -> Matching:
    """Descents from one or several starts on any blocks; see :func:`match_weights`."""
    solver()  # so that its import is not counted, and refused early
    began, clock = time.perf_counter(), Clock()
    chosen = {symmetry[name].name for name in groups} if groups is not None else {g.name for g in symmetry.groups}
    known = {name for block in blocks for name in block.names}
    matched = {g.name for g in symmetry.groups if g.name in chosen & known and _is_chain(symmetry, g)}
    parts = [g for g in symmetry.groups if g.name in matched or any(g.name in symmetry[m].within for m in matched)]
    units = [Units(g.name, g.size, g.within) for g in parts]
    held = frozenset(g.name for g in parts if g.name not in matched)
    given = {**symmetry.identity(), **symmetry.compose(start or {}, {})}
    generator = np.random.default_rng(seed)
    best: tuple[Descent, Permutations, int] | None = None
    for restart in range(restarts):
        begin: Permutations = given
        if restart:
            begin = symmetry.compose(
                given, symmetry.random(generator, tuple(m.name for m in units if m.name in matched))
            )
        every = [Units(g.name, g.size, g.within) for g in symmetry.groups]
        fresh = [Block(block.a, tensor, block.names) for block, tensor in zip(blocks, _started(blocks, every, begin))]
        descent = Descent(fresh, units, clock, held).run(max_sweeps, generator)
        if best is None or descent.history[-1] > best[0].history[-1]:
            best = descent, begin, restart
    assert best is not None
    descent, total, restart = best
    for step in descent.steps:
        total = symmetry.compose(total, step)
    return Matching(
        permutations={name: np.asarray(p) for name, p in total.items()},
        objective=descent.history[-1],
        history=tuple(descent.history),
        sweeps=descent.sweeps,
        converged=descent.converged,
        restart=restart,
        unmatched=tuple(g.name for g in symmetry.groups if g.name in chosen - matched),
        seconds=time.perf_counter() - began,
        assignment_seconds=clock.seconds,
        assignments=clock.calls,
    )


def _started(blocks: Sequence[Block], units: Sequence[Units], begin: Permutations) -> list[Tensor]:
    moving = {n: p for n, p in begin.items() if (p != np.arange(p.shape[-1])).any()}
    return list(moved(blocks, units, moving))


def _is_chain(symmetry: Symmetry, group: Group) -> bool:
    """Whether each group around it lies within the one before; units inside of two independent ones stay."""
    return all(symmetry[name].within == group.within[:i] for i, name in enumerate(group.within))


def align(
    model: Any, to: Any, symmetry: Symmetry | None = None, *, inputs: Any = None, restarts: int = 1, seed: int = 0
) -> dict[str, Any]:
    """A model's state dict with its units in the order of another model's, ready for any merge.

    Args:
        model: a state dict or a module, which stays as it is.
        to: the model to be merged with.
        symmetry: of both; found from whichever of the two is a module if None.
        inputs: example inputs of the module, see ``weft.symmetry.find_symmetry``.
        restarts, seed: see :func:`match_weights`.

    Returns:
        A new state dict of the same function. Models with batch norm need :func:`reset_batch_norm_` after a merge.

    Raises:
        RecipeError: no symmetry is given and neither model is a module. See also :func:`match_weights`.

    >>> import torch
    >>> def network():
    ...     return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> a, b, x = network(), network(), torch.randn(5, 3)
    >>> aligned = align(b, a, inputs=x)
    >>> torch.allclose(torch.func.functional_call(b, aligned, x), b(x), atol=1e-6)
    True
    """
    if symmetry is None:
        module = next((m for m in (model, to) if isinstance(m, nn.Module)), None)
        if module is None:
            raise RecipeError(
                "Which units may be permuted is found from a module: give one of the two models as a torch.nn.Module, "
                "or symmetry=weft.symmetry.find_symmetry(module, inputs)."
            )
        symmetry = find_symmetry(module, inputs)
    found = match_weights(to, model, symmetry, restarts=restarts, seed=seed)
    state = model if isinstance(model, Mapping) else model.state_dict()
    return dict(symmetry.apply(state, found.permutations))
