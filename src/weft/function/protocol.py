"""What a weight function is.

A weight function computes a weight W from a stored tensor and parameters of its own. It is an ``nn.Module`` whose
``forward(stored)`` returns W, and it may offer four things more:

- ``right_inverse(weight)``: the stored tensor from which ``forward`` gives ``weight`` back, where there is one;
- ``product(x, inner)``: x multiplied by W, when that is cheaper than building it; ``inner(x)`` multiplies by what lies
  beneath, so that fast paths chain;
- ``lookup(gather, inner)``: rows of W, for embeddings, when that is cheaper than building it; ``gather`` takes rows of
  a table, and ``inner(gather)`` those of what lies beneath;
- ``update(stored)``: a change of buffers, called once before each forward pass in training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from weft.method import Method

Inner = Callable[[Tensor], Tensor]
Gather = Callable[[Tensor], Tensor]  # (rows, columns) -> (…, columns): the rows that an embedding's input names
Looked = Callable[[Gather], Tensor]


class WeightFunction(nn.Module, ABC):
    """Base of all weight functions.

    Subclasses define ``forward``. The other methods go with a ``has_…`` each, and a function that does not set it leaves
    them out; so they are not abstract.

    Shapes are those of a matrix as ``nn.Linear`` stores it, (out, in), with any further axes of a convolution behind
    (out, in, …), or a stack of matrices (experts, out, in) where ``batched`` is true; :mod:`weft.function.layout` turns
    what a layer stores into one of these. Parameters have at least one axis, since sharded training splits the first,
    and those that train beside the stored tensor have its dtype.
    """

    has_product = False
    has_lookup = False
    has_update = False
    freezes = False  # the stored tensor does not train (adapters)
    enabled = True  # adapters can be switched off, and return the stored tensor then

    @abstractmethod
    def forward(self, stored: Tensor) -> Tensor:
        """The weight. Runs in every forward pass, so it must compile: no branches on values, no ``.item()``."""

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The stored tensor for a weight, of the same shape; the weight itself unless a subclass knows better."""
        return weight

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        """x (…, in) times Wᵀ, as (…, out); ``inner`` multiplies by the stored matrix. Set ``has_product``."""
        raise NotImplementedError

    def lookup(self, gather: Gather, inner: Looked) -> Tensor:
        """Rows of the weight, (…, columns); ``inner(gather)`` are those of the stored one. Set ``has_lookup``."""
        raise NotImplementedError

    def update(self, stored: Tensor) -> None:
        """Change buffers, once before a forward pass in training, without gradients. Set ``has_update``."""
        raise NotImplementedError


class FunctionConfig(Protocol):
    """A configuration that knows how to build its function for one weight.

    One whose functions depend on each other or on data has a method
    ``plan(model, weights, data) -> mapping`` beside it: from all the weights that it was chosen for, by full name and as
    functions see them, to what builds each of them; weights that are left out get no function. One whose function takes
    vectors, too, says ``takes_vectors = True``.
    """

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """The function for a weight of this shape, dtype and device; ``batched`` for a stack of matrices."""


class PlannedConfig(FunctionConfig, Protocol):
    """A configuration whose functions depend on each other or on data."""

    def plan(
        self, model: nn.Module, weights: Mapping[str, Tensor], data: Iterable[Any] | None
    ) -> Mapping[str, FunctionConfig]:
        """What builds the function of each weight; ``data`` are batches as the model takes them."""


@dataclass(frozen=True)
class FunctionMethod(Method):
    """A registry row of a weight function.

    Attributes:
        starts_at: what W is right after attaching: "weight" (unchanged) or "transformed" (f of the old weight).
        approximate: why the gradient is not the exact one; empty if it is.
        trial: parameters for the small layers of the contract battery, where the defaults do not fit 8 × 16 matrices.
        adapter: whether its functions are adapters, which pass a second part of the battery.
        checkpoints: name of the parameter that lists checkpoints of the model, if it needs any; the contract battery
            fills it with files of its own.
    """

    starts_at: str = "weight"
    approximate: str = ""
    trial: Mapping[str, Any] = field(default_factory=dict)
    adapter: bool = False
    checkpoints: str = ""


def as_matrix(weight: Tensor) -> Tensor:
    """(out, in, …) -> (out, rest): a convolution's kernel as the matrix that it multiplies by.

    >>> import torch
    >>> as_matrix(torch.zeros(4, 3, 5, 5)).shape
    torch.Size([4, 75])
    """
    return weight if weight.dim() == 2 else weight.reshape(weight.shape[0], -1)


def wide(weight: Tensor) -> torch.dtype:
    """The type to accumulate in: float32, or float64 for a weight of that type.

    >>> wide(torch.zeros(1, dtype=torch.bfloat16)), wide(torch.zeros(1, dtype=torch.float64))
    (torch.float32, torch.float64)
    """
    return torch.promote_types(weight.dtype, torch.float32)
