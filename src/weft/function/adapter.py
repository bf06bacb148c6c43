"""A change of a frozen weight that can be switched off, scaled and taken away: what LoRA and its relatives are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weft.function.protocol import Gather, Inner, Looked, WeightFunction


@dataclass(frozen=True)
class PeftForm:
    """How PEFT's files say one adapted weight.

    Attributes:
        type: PEFT's ``peft_type``.
        config: fields of ``adapter_config.json`` that this weight needs.
        tensors: by the end of the name in PEFT's file (``lora_A.weight``), in the shape that a linear layer has there;
            where PEFT's embeddings and convolutions differ, :mod:`weft.adapt.peft_folder` turns them.
    """

    type: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Adapter(WeightFunction):
    """Base of adapters: W = W₀ + strength · scale · change(W₀). Subclasses define ``change``, and ``to_lora`` if exact.

    Subclasses with ``has_product`` define ``changed(x)``, x times the change; those with ``has_lookup`` define
    ``change_rows``. None of the three is abstract: one that replaces the weight instead overrides ``forward`` itself.

    Attributes:
        adapter: the name it was added under.
        enabled: whether it changes anything now; neither this nor the strength is part of a state dict.
        strength: what a user scales it by; 1 is as trained.
        scale: what the method scales its change by, such as LoRA's alpha / rank.
        config: what builds this very function again, for saving; the configuration that ``weft.adapt_`` was given,
            unless the function knows better: one whose shapes come from data or from other weights sets it to a
            configuration that says them.
    """

    freezes = True

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.adapter = "default"
        self.enabled = True
        self.strength = 1.0
        self.scale = scale
        self.config: Any = None

    def change(self, stored: Tensor) -> Tensor:
        """What is added to the stored weight, in its shape, in at least float32; without scale and strength."""
        raise NotImplementedError

    def changed(self, x: Tensor) -> Tensor:
        """x (…, in) times the change, (…, out); without scale and strength. Set ``has_product``."""
        raise NotImplementedError

    def change_rows(self, gather: Gather) -> Tensor:
        """Rows of the change, (…, columns), where ``gather`` takes rows of a table. Set ``has_lookup``."""
        raise NotImplementedError

    def to_lora(self) -> tuple[Tensor, Tensor] | None:
        """A (rank, in) and B (out, rank) whose product is the change, scale included; None if there are none.

        Only changes that do not depend on the stored weight have them.
        """
        return None

    def peft(self) -> PeftForm | None:
        """How PEFT says this function, its state included, so that training can go on; None if it cannot."""
        return None

    def forward(self, stored: Tensor) -> Tensor:
        """See the base."""
        if not self.enabled:
            return stored
        return scaled_sum(stored, self.change(stored), self.scale * self.strength).to(stored.dtype)

    def product(self, x: Tensor, inner: Inner) -> Tensor:
        """See the base."""
        y = inner(x)
        if not self.enabled:
            return y
        return scaled_sum(y, self.changed(x), self.scale * self.strength).to(y.dtype)

    def lookup(self, gather: Gather, inner: Looked) -> Tensor:
        """See the base."""
        y = inner(gather)
        if not self.enabled:
            return y
        return scaled_sum(y, self.change_rows(gather), self.scale * self.strength).to(y.dtype)


def scaled_sum(value: Tensor, change: Tensor, scale: float) -> Tensor:
    """value + scale · change, in one pass where that is safe and rounds as two do: where the scale is a power of two.

    So a live model, its merged weights and PEFT's give the same bits. Inductor (torch 2.13) makes one ``addmm`` of a product and
    ``torch.add(…, alpha=scale)``, and drops the scale.

    >>> scaled_sum(torch.ones(2), torch.ones(2), 0.5)
    tensor([1.5000, 1.5000])
    """
    if torch.compiler.is_compiling() or not _is_power_of_two(scale):
        return value + scale * change
    return torch.add(value, change, alpha=scale)


def add_product(value: Tensor, thin: Tensor, factor: Tensor, scale: float) -> Tensor:
    """value (…, out) + scale · thin (…, rank) · factorᵀ, factor (out, rank).

    Product, scale and sum in one pass over ``value``, and without a second tensor of its size for the backward pass,
    where all have one dtype and the scale is a power of two (see :func:`scaled_sum`).

    >>> add_product(torch.ones(1, 2), torch.ones(1, 1), torch.tensor([[1.0], [3.0]]), 0.5)
    tensor([[1.5000, 2.5000]])
    """
    if value.dtype != thin.dtype or value.dim() < 2 or not _is_power_of_two(scale):
        return scaled_sum(value, functional.linear(thin, factor), scale).to(value.dtype)
    rows = torch.addmm(value.flatten(0, -2), thin.flatten(0, -2), factor.mT, alpha=scale)
    return rows.view(value.shape)


def _is_power_of_two(scale: float) -> bool:
    return math.frexp(scale)[0] in (0.5, -0.5)
