"""Match the units of two models by the loss of their average, through a straight-through estimator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.merge.weight_matching.activations import call, evaluation
from weft.merge.weight_matching.blocks import as_tensor
from weft.merge.weight_matching.methods import StraightThroughMatching
from weft.merge.weight_matching.weights import Permutations, match_weights
from weft.method import configure
from weft.symmetry import Symmetry


@dataclass(frozen=True)
class StraightThrough:
    """What :func:`match_straight_through` found.

    Attributes:
        permutations: for ``symmetry.apply``, those with the lowest loss.
        losses: of the average of both models, at every step, on that step's batch.
        best_step: which step was kept.
    """

    permutations: Permutations
    losses: tuple[float, ...]
    best_step: int


def match_straight_through(
    reference: nn.Module,
    model: Any,
    symmetry: Symmetry,
    batches: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    *,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    score: Callable[[dict[str, Tensor]], float] | None = None,
    max_sweeps: int = 100,
    seed: int = 0,
) -> StraightThrough:
    """Train the order of a model's units through the loss of its average with a reference.

    Free parameters φ start at A. At every step π matches B to φ, starting from the last π; the loss is taken at
    (A + π(B)) / 2, its gradient goes to φ as if π(B) were φ, and φ takes a step of gradient descent with momentum.

    Args:
        reference: A, which stays as it is.
        model: B, a state dict or a module.
        symmetry: of both.
        batches: (inputs, targets), one for each step; inputs as a module takes them (tensor, tuple or mapping).
        loss: (outputs, targets) -> a scalar.
        learning_rate, momentum: of φ.
        score: of the average's state dict, lower is better: how the step that is kept is chosen; by the loss on each
            step's own batch if None, which is noisy where batches are small.
        max_sweeps: of each matching.
        seed: of the order of groups in a sweep.

    Returns:
        A :class:`StraightThrough`.

    Raises:
        RecipeError: no batch, the loss is NaN at every step, or a parameter is out of its bounds. See also
            :func:`match_weights`.

    Source: Ainsworth et al., arXiv:2209.04836, section 3.3.

    >>> from weft.symmetry import find_symmetry
    >>> a = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> x, y = torch.randn(50, 3), torch.randn(50, 2)
    >>> symmetry = find_symmetry(a, x)
    >>> b = symmetry.apply(a.state_dict(), symmetry.random(torch.Generator().manual_seed(0)))
    >>> found = match_straight_through(a, b, symmetry, [(x, y)], nn.functional.mse_loss)
    >>> torch.equal(symmetry.apply(b, found.permutations)["0.weight"], a[0].weight)
    True
    """
    given = {"learning_rate": learning_rate, "momentum": momentum, "max_sweeps": max_sweeps}
    configure(StraightThroughMatching, given, "match_straight_through")
    parameters = {name: p.detach() for name, p in reference.named_parameters()}
    free = {n: p.clone().requires_grad_(p.is_floating_point()) for n, p in parameters.items()}
    buffers = {name: b.detach() for name, b in reference.named_buffers()}
    other = dict(model) if not isinstance(model, nn.Module) else model.state_dict()
    optimizer = torch.optim.SGD([p for p in free.values() if p.requires_grad], lr=learning_rate, momentum=momentum)
    permutations: Permutations = symmetry.identity()
    losses: list[float] = []
    best: tuple[float, int, Permutations] | None = None
    for step, (inputs, targets) in enumerate(batches):
        target = {**buffers, **{name: p.detach() for name, p in free.items()}}
        permutations = match_weights(
            target, other, symmetry, start=permutations, max_sweeps=max_sweeps, seed=seed
        ).permutations
        moved = symmetry.apply(other, permutations)
        with evaluation(reference), torch.enable_grad():
            merged = {
                n: 0.5 * a + 0.5 * (as_tensor(moved[n]).to(a) + free[n] - free[n].detach())
                for n, a in parameters.items()
            }
            for module in batch_norms(reference):  # statistics of the average are those of its batch
                module.training = True
            states = {**merged, **{name: b.clone() for name, b in buffers.items()}}
            value = loss(call(_with(reference, states), inputs), targets)
        losses.append(value.item())
        found = losses[-1] if score is None else score({n: t.detach() for n, t in states.items()})
        if not math.isnan(found) and (best is None or found < best[0]):
            best = found, step, permutations
        if math.isfinite(losses[-1]):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    if best is None:
        raise RecipeError(
            "There is no batch to train the permutation on."
            if not losses
            else f"The loss is NaN at all of {len(losses)} steps. Check the batches and the models."
        )
    return StraightThrough(best[2], tuple(losses), best[1])


def _with(model: nn.Module, states: dict[str, Tensor]) -> Callable[..., Any]:
    return lambda *args, **kwargs: torch.func.functional_call(model, states, args, kwargs)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Modules that keep running statistics of batches."""
    return [m for m in model.modules() if hasattr(m, "running_mean") and hasattr(m, "momentum")]
