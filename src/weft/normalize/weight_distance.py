"""Record how far the weights of a model are from where they started, and tell slow diffusion from ordinary.

Train longer, generalize better, Hoffer et al., arXiv:1705.08741 (2017).

    d_t = |w_t − w_0|₂ over all trained parameters, t: steps
    ultra-slow diffusion, the paper's claim for the first phase at a high rate:   d_t ≈ a + c log t
    ordinary diffusion, a random walk without a landscape:                        d_t ≈ a + c √t

Differences from the paper and its code: both laws are fitted with an offset by least squares, and compared by their R²
on the same points; the paper shows curves. Fit the phase of a constant learning rate only (``first``, ``last``):
a rate that falls bends any curve. R² of two curves this alike differs little; look at the residuals before believing it.
Complexity: one pass over the parameters a record, and a copy of them. Re-implemented from the equations (official code:
MIT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.errors import RecipeError

_LEAST_POINTS = 3  # two always lie on a line


@dataclass(frozen=True)
class Line:
    """A least-squares line.

    Attributes:
        slope, intercept: of distance against the transformed step.
        r_squared: share of the distances' variance that it explains; 1 where they are all equal and hit.
    """

    slope: float
    intercept: float
    r_squared: float


@dataclass(frozen=True)
class DistanceFit:
    """Two laws fitted to the same points.

    Attributes:
        log: distance against log t.
        sqrt: distance against √t.
        points: how many were fitted.
    """

    log: Line
    sqrt: Line
    points: int

    @property
    def law(self) -> str:
        """The law with the higher R²: "log" or "sqrt"."""
        return "log" if self.log.r_squared >= self.sqrt.r_squared else "sqrt"


def fit_distance(steps: Sequence[int], distances: Sequence[float]) -> DistanceFit:
    """Fit a + c log t and a + c √t.

    Args:
        steps: t, counted from 1.
        distances: |w_t − w_0| at each.

    Raises:
        RecipeError: fewer than three different steps, a step below 1, lists of unlike lengths, or NaN.

    Source: arXiv:1705.08741, section 3.

    >>> fit = fit_distance([1, 10, 100], [1.0, 3.0, 5.0])
    >>> fit.law, round(fit.log.r_squared, 9), round(fit.log.intercept, 9)
    ('log', 1.0, 1.0)
    """
    if len(steps) != len(distances):
        raise RecipeError(f"Each step has one distance, got {len(steps)} steps and {len(distances)} distances.")
    if len(set(steps)) < _LEAST_POINTS:
        raise RecipeError(f"A fit needs {_LEAST_POINTS} different steps at least, got {len(set(steps))}; record more.")
    if min(steps) < 1 or not all(map(math.isfinite, distances)):
        raise RecipeError(
            "Steps count from 1 and distances are finite: leave out step 0, and the steps after training has diverged."
        )
    d = torch.tensor(distances, dtype=torch.float64)
    t = torch.tensor(steps, dtype=torch.float64)
    return DistanceFit(_line(t.log(), d), _line(t.sqrt(), d), len(steps))


class WeightDistance:
    """Distances of a model's parameters from where they are now.

    Args:
        model: its parameters that train are copied; attach functions before, for what is stored is compared.

    Raises:
        RecipeError: no parameter trains.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> recorder = WeightDistance(layer)
    >>> with torch.no_grad():
    ...     _ = layer.weight.add_(torch.tensor([[3.0, 4.0]]))
    >>> recorder.record(1)
    >>> [round(d, 5) for d in recorder.distances]
    [5.0]
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        if not self.start:
            raise RecipeError("No parameter of the model trains, so none can move.")
        self.steps: list[int] = []
        self._distances: list[Tensor] = []

    @torch.no_grad()
    def record(self, step: int) -> None:
        """Note the distance after ``step`` steps; nothing waits for the device.

        Raises:
            RecipeError: the step is not after the last one, or parameters have gone, as baking makes them.
        """
        if step < 1 or (self.steps and step <= self.steps[-1]):
            raise RecipeError(f"Steps count up from 1, got {step} after {self.steps[-1] if self.steps else 'none'}.")
        now = dict(self.model.named_parameters())
        if gone := [n for n in self.start if n not in now]:
            raise RecipeError(f"{gone[0]} is no parameter of the model any more; make a recorder after such a change.")
        norms = [torch.linalg.vector_norm(now[n].detach() - w, dtype=_total(w)) for n, w in self.start.items()]
        self.steps.append(step)
        self._distances.append(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))

    @property
    def distances(self) -> list[float]:
        """|w_t − w_0| at each recorded step."""
        return [float(d) for d in self._distances]

    def fit(self, first: int = 1, last: int | None = None) -> DistanceFit:
        """Both laws, on the records of steps ``first`` to ``last``; see :func:`fit_distance`."""
        chosen = [(t, d) for t, d in zip(self.steps, self.distances) if first <= t and (last is None or t <= last)]
        return fit_distance([t for t, _ in chosen], [d for _, d in chosen])


def _total(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.device.type == "mps" else torch.float64


def _line(x: Tensor, y: Tensor) -> Line:
    across, along = x - x.mean(), y - y.mean()
    slope = torch.dot(across, along) / torch.dot(across, across)
    residual, spread = (along - slope * across).square().sum(), along.square().sum()
    explained = 1 - residual / spread if spread > 0 else torch.ones(())
    return Line(float(slope), float(y.mean() - slope * x.mean()), float(explained))
