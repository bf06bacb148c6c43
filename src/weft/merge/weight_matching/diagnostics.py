"""Why two models can be averaged, or cannot: the loss between them, their distance, and how their directions agree."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import NonFiniteError, RecipeError, ShapeError
from weft.merge.weight_matching.blocks import as_tensor

POINTS = 25  # on the line, as in the reference code
GAMMAS = (0.0, 0.3)  # shares of the largest singular value from which a direction counts, as in the paper


@dataclass(frozen=True)
class Barrier:
    """A loss along the line (1 − λ) A + λ B.

    Attributes:
        positions: λ, from 0 to 1.
        losses: at each.
        height: the largest rise over the line between both ends' losses; 0 or more.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    height: float


@dataclass(frozen=True)
class MatchReport:
    """Two models before and after one was put into the other's order.

    Attributes:
        distance_before, distance_after: ‖A − B‖, ‖A − π(B)‖ over all floating-point tensors.
        distance_reduction: 1 − after / before.
        alignment_before, alignment_after: R for each γ, by its text.
        barrier_before, barrier_after: with a loss only.
    """

    distance_before: float
    distance_after: float
    distance_reduction: float
    alignment_before: dict[str, float]
    alignment_after: dict[str, float]
    barrier_before: Barrier | None = None
    barrier_after: Barrier | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict())


def loss_barrier(a: Any, b: Any, loss: Callable[[dict[str, Tensor]], float], *, points: int = POINTS) -> Barrier:
    """The loss along the line between two models, and how far it rises.

    Args:
        a, b: state dicts or modules of the same shapes; what is not floating point is A's.
        loss: of a state dict, in any unit; lower is better (give 1 − accuracy for accuracy). For models with batch norm
            it estimates the statistics again, see :func:`reset_batch_norm_`.
        points: places on the line, at least 3.

    Returns:
        A :class:`Barrier`; its height is max_λ L((1−λ)A + λB) − [(1−λ) L(A) + λ L(B)].

    Raises:
        RecipeError: fewer than 3 points. ShapeError: the models differ.

    Source: Frankle et al., arXiv:1912.05671; as used in arXiv:2402.04051.

    >>> one, other = {"w": torch.tensor([1.0])}, {"w": torch.tensor([-1.0])}
    >>> loss_barrier(one, other, lambda state: float((state["w"] ** 2 - 1) ** 2), points=3)
    Barrier(positions=(0.0, 0.5, 1.0), losses=(0.0, 1.0, 0.0), height=1.0)
    """
    if points < 3:
        raise RecipeError(f"A barrier needs both ends and something between them, so 3 points or more; got {points}.")
    first, second = _pair(a, b)
    positions = tuple(i / (points - 1) for i in range(points))
    losses = []
    for t in positions:
        state = {n: torch.lerp(v, second[n].to(v), t) if v.is_floating_point() else v for n, v in first.items()}
        losses.append(float(loss(state)))
    rises = [value - ((1 - t) * losses[0] + t * losses[-1]) for t, value in zip(positions, losses)]
    return Barrier(positions, tuple(losses), math.nan if any(r != r for r in rises) else max(rises))


def distance(a: Any, b: Any) -> float:
    """‖A − B‖₂ over all floating-point tensors of two models, in float64.

    >>> distance({"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])})
    5.0
    """
    first, second = _pair(a, b)
    squares = [
        (v.double() - second[n].to(v.device).double()).square().sum() for n, v in first.items() if v.is_floating_point()
    ]
    return math.sqrt(sum(float(s) for s in squares))


def singular_alignment(a: Any, b: Any, *, gamma: float = 0.3, names: Sequence[str] | None = None) -> float:
    """How far the large singular directions of two models' weights agree: 1 if they are the same, 0 by chance.

        R = Σ_ℓ Σ_ij (u_a,i · u_b,j) (v_a,i · v_b,j) / Σ_ℓ n_ℓ        over i, j with σ_i ≥ γ σ_max in their own layer

    The double sum is ⟨U_a V_aᵀ, U_b V_bᵀ⟩, the product of truncated polar factors, so signs and the order of equal
    singular values do not matter. n_ℓ is the geometric mean of both counts, by which |R| ≤ 1.

    Args:
        a, b: state dicts or modules of the same shapes, both in one order of units.
        gamma: share of the largest singular value from which a direction counts, 0 to 1.
        names: tensors to look at; all floating-point ones with two axes or more if None. Further axes than the first
            are taken as one.

    Raises:
        RecipeError: gamma outside 0 to 1, or no weight. ShapeError: the models differ. NonFiniteError: NaN.

    Source: arXiv:2402.04051; the mean of both counts is ours.

    >>> one = {"w": torch.diag(torch.tensor([3.0, 2.0, 0.1]))}
    >>> round(singular_alignment(one, {"w": one["w"].roll(1, 0)}), 3), round(singular_alignment(one, one), 3)
    (0.0, 1.0)
    """
    if not 0 <= gamma <= 1:
        raise RecipeError(f"gamma is a share of the largest singular value, 0 to 1; got {gamma}.")
    first, second = _pair(a, b)
    chosen = [n for n, v in first.items() if v.is_floating_point() and v.ndim >= 2] if names is None else list(names)
    if not chosen or any(n not in first for n in chosen):
        raise RecipeError(
            "Singular directions are compared for weights with two axes or more; none is given, or not there."
        )
    product = count = 0.0
    for name in chosen:
        one, size = _polar(name, first[name], gamma)
        other, size_of_other = _polar(name, second[name].to(first[name].device), gamma)
        product += float((one * other).sum())
        count += math.sqrt(size * size_of_other)
    return product / count if count else 0.0


def _polar(name: str, weight: Tensor, gamma: float) -> tuple[Tensor, int]:
    """U Vᵀ of the directions that count, and how many there are."""
    matrix = weight.detach().double().flatten(1)
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"{name} holds NaN or infinity, so it has no singular values.")
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    # directions of rounding are none, with γ = 0 too
    kept = s >= max(gamma, 1e-12) * s.max() if s.max() > 0 else torch.zeros_like(s, dtype=torch.bool)
    return u[:, kept] @ v[kept], int(kept.sum())


def match_report(
    reference: Any,
    model: Any,
    aligned: Any,
    *,
    loss: Callable[[dict[str, Tensor]], float] | None = None,
    points: int = POINTS,
    gammas: Sequence[float] = GAMMAS,
) -> MatchReport:
    """What a matching changed: distance, agreement of singular directions, and with a loss the barrier.

    Args:
        reference: A, a state dict or a module.
        model: B as it was.
        aligned: π(B), from :func:`align`.
        loss, points: see :func:`loss_barrier`.
        gammas: see :func:`singular_alignment`.

    >>> one, other = {"w": torch.eye(2)}, {"w": torch.eye(2).flip(0)}
    >>> report = match_report(one, other, one)
    >>> report.distance_reduction, round(report.alignment_before["0.3"], 3), round(report.alignment_after["0.3"], 3)
    (1.0, 0.0, 1.0)
    """
    before, after = distance(reference, model), distance(reference, aligned)
    return MatchReport(
        distance_before=before,
        distance_after=after,
        distance_reduction=1 - after / before if before else 0.0,
        alignment_before={f"{g:g}": singular_alignment(reference, model, gamma=g) for g in gammas},
        alignment_after={f"{g:g}": singular_alignment(reference, aligned, gamma=g) for g in gammas},
        barrier_before=loss_barrier(reference, model, loss, points=points) if loss else None,
        barrier_after=loss_barrier(reference, aligned, loss, points=points) if loss else None,
    )


def _pair(a: Any, b: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = (_state(value) for value in (a, b))
    for name in {**first, **second}:
        if name not in first or name not in second or first[name].shape != second[name].shape:
            shapes = [tuple(s[name].shape) if name in s else "nothing" for s in (first, second)]
            raise ShapeError(
                f"{name} is {shapes[0]} in the first model and {shapes[1]} in the second; shapes must agree."
            )
    return first, second


def _state(model: Any) -> dict[str, Tensor]:
    values: Mapping[str, Any] = model.state_dict() if isinstance(model, nn.Module) else model
    return {n: as_tensor(v) for n, v in values.items()}
