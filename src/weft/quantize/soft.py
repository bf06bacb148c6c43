"""What is trained on the way to a packed weight, with which loss, and the descent that does it.

A :class:`Soft` is a matrix (out, in) that depends on parameters, and the packed weight that its present state stands for.
:func:`descend` minimises any loss of such matrices and leaves the state whose *packed* weights were best, the start among
them. What the loss is of, a layer or a block, is the business of :mod:`weft.quantize.reconstruct`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.packed import Packed

OPTIMIZERS = ("adam", "adamax", "momentum", "sign")
DECAYS = ("none", "linear", "cosine")
BESIDE_RATE = 1e-3  # largest learning rate of what is trained beside the Softs

Loss = Callable[[Tensor, Tensor], Tensor]  # outputs and targets (tokens, width) -> one number for each token
Weights = dict[str, Tensor]


class Soft(nn.Module, ABC):
    """A matrix that is trained on the way to a packed weight. Subclasses give :meth:`forward` and :meth:`packed`.

    >>> from weft.quantize import Grid, SignRounding
    >>> soft = SignRounding(torch.tensor([[0.0, 0.9, 2.1, 3.0]]), Grid(bits=2, group_size=0))
    >>> [name for name, _ in soft.named_parameters()], soft.packed().codes.tolist()
    (['offset', 'lower', 'upper'], [[0, 1, 2, 3]])
    """

    @abstractmethod
    def forward(self) -> Tensor:
        """The matrix (out, in), float32, with gradients to the parameters."""

    @abstractmethod
    def packed(self) -> Packed:
        """The packed weight that the present state stands for."""

    def begin(self, progress: float) -> None:
        """Before each step: the share of the steps that are done."""

    def project(self) -> None:
        """After each step: put parameters back into their bounds."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss, in which 1 is the loss of the start; None for nothing."""
        return None

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Parameters by what their learning rate is multiplied by."""
        return [(1.0, list(self.parameters()))]


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """‖y − t‖² of each token: two of (…, width) -> (…).

    >>> squares(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)).tolist()
    [5.0]
    """
    return (outputs - targets).square().sum(-1)


def sizes(outputs: Tensor, targets: Tensor) -> Tensor:
    """‖y − t‖₁ of each token.

    >>> sizes(torch.tensor([[1.0, -2.0]]), torch.zeros(1, 2)).tolist()
    [3.0]
    """
    return (outputs - targets).abs().sum(-1)


def angles(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 − cos of the angle between y and t, of each token.

    >>> angles(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).tolist()
    [1.0]
    """
    return 1 - functional.cosine_similarity(outputs, targets, dim=-1)


def divergences(outputs: Tensor, targets: Tensor) -> Tensor:
    """KL(softmax t ‖ softmax y) of each token, for outputs that are logits.

    >>> divergences(torch.zeros(1, 2), torch.zeros(1, 2)).tolist()
    [0.0]
    """
    expected = targets.log_softmax(-1)
    return (expected.exp() * (expected - outputs.log_softmax(-1))).sum(-1)


def weighted(fisher: Tensor) -> Loss:
    """Σ_c F_c (y_c − t_c)² of each token, for the mean squared gradients F (width,) of a task's loss by the outputs.

    >>> weighted(torch.tensor([1.0, 10.0]))(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)).tolist()
    [41.0]
    """
    return lambda outputs, targets: ((outputs - targets).square() * fisher).sum(-1)


@dataclass(frozen=True)
class Descent:
    """How parameters are trained.

    Attributes:
        steps: gradient steps; 0 keeps the start.
        rate: learning rate of the first step.
        optimizer: adam, adamax, momentum (SGD with 0.9), or sign (steps of the rate along the gradient's sign).
        decay: of the learning rate to zero over the steps: none, linear or cosine.
        samples: sequences of a mini-batch.
        loss: of outputs and targets, see :func:`squares`.

    >>> Descent(steps=500, optimizer="adamax", loss=angles).decay
    'cosine'
    """

    steps: int = 200
    rate: float = 1e-3
    optimizer: str = "adam"
    decay: str = "cosine"
    samples: int = 8
    loss: Loss = squares


def through(x: Tensor, rounded: Tensor) -> Tensor:
    """The values of ``rounded`` with the gradient of ``x`` (straight-through).

    >>> x = torch.tensor([0.7], requires_grad=True)
    >>> y = through(x, x.round())
    >>> y.backward()
    >>> y.item(), x.grad.item()
    (1.0, 1.0)
    """
    return _Through.apply(x, rounded)


class _Through(torch.autograd.Function):
    """x + (rounded − x) would not be ``rounded`` to the last bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def descend(
    softs: Mapping[str, Soft],
    loss: Callable[[Weights], Tensor],
    score: Callable[[Weights], float],
    descent: Descent,
    beside: Mapping[str, nn.Parameter] | None = None,
    checks: int = 8,
) -> tuple[float, float]:
    """Train, and leave the best state in the Softs.

    Args:
        softs: by name.
        loss: of the matrices by name, and of what ``beside`` holds under its names; differentiable.
        score: the same of packed weights, without gradients, on what the result is judged by.
        descent: how.
        beside: other parameters to train (biases).
        checks: how often the score is taken, at equal distances and at the end.

    Returns:
        The scores of the start and of the end, which is never larger.

    >>> from weft.quantize import Grid
    >>> from weft.quantize.flexround import FlexRounding
    >>> soft = FlexRounding(torch.tensor([[0.0, 0.4, 1.4, 3.0]]), Grid(bits=2, group_size=0))
    >>> off = lambda weights: (weights["w"].sum() - 4.8).square()
    >>> before, after = descend({"w": soft}, off, lambda w: float(off(w)), Descent(50, 0.05))
    >>> after < before
    True
    """
    more = dict(beside or {})
    parameters = [p for s in softs.values() for p in s.parameters()] + list(more.values())

    def judged() -> float:
        return score({n: s.packed().dequantize() for n, s in softs.items()} | {n: p.detach() for n, p in more.items()})

    start = best = judged()
    if not descent.steps or not start > 0 or not parameters:
        return start, start
    kept = [p.detach().clone() for p in parameters]
    groups = [(rate, params) for s in softs.values() for rate, params in s.rates()]
    groups.append((min(1.0, BESIDE_RATE / (descent.rate or 1.0)), list(more.values())))
    optimizer = _optimizer([(rate * descent.rate, params) for rate, params in groups if params], descent.optimizer)
    first = [group["lr"] for group in optimizer.param_groups]
    every = max(1, descent.steps // checks)
    for step in range(descent.steps):
        progress = step / descent.steps
        for soft in softs.values():
            soft.begin(progress)
        for group, rate in zip(optimizer.param_groups, first):
            group["lr"] = rate * _share(descent.decay, progress)
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss({n: s() for n, s in softs.items()} | more) / start
            for soft in softs.values():
                penalty = soft.penalty()
                value = value if penalty is None else value + penalty
            if not value.isfinite():
                break  # the best state is kept
            value.backward()
        if descent.optimizer == "sign":
            for p in parameters:
                if p.grad is not None:
                    p.grad.sign_()
        optimizer.step()
        with torch.no_grad():
            for soft in softs.values():
                soft.project()
        if (step + 1) % every == 0 or step + 1 == descent.steps:
            found = judged()
            if found < best:
                best = found
                kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, value in zip(parameters, kept):
            p.copy_(value)
    return start, best


def _share(decay: str, progress: float) -> float:
    """Of the first learning rate."""
    return {"none": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[decay]


def _optimizer(groups: list[tuple[float, list[nn.Parameter]]], kind: str) -> torch.optim.Optimizer:
    given: list[Any] = [{"params": params, "lr": rate} for rate, params in groups]
    if kind == "adam":
        return torch.optim.Adam(given, lr=1.0)
    if kind == "adamax":
        return torch.optim.Adamax(given, lr=1.0)
    return torch.optim.SGD(given, lr=1.0, momentum=0.9 if kind == "momentum" else 0.0)
