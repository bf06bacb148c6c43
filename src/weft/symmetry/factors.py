"""A factor of an axis, and axes as products of factors."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from weft.errors import WeftError


class Misaligned(WeftError):
    """Factors cannot be cut as asked."""


class Factor:
    """A permutable unit: ``size`` places; with ``parts``, a product or a concatenation (``is_sum``) of other factors."""

    __slots__ = ("frozen", "hints", "is_sum", "number", "parent", "parts", "size", "uniform")

    def __init__(self, size: int, number: int, frozen: str = ""):
        self.size = size
        self.number = number
        self.frozen = frozen
        self.parent: Factor | None = None
        self.parts: list[Factor] = []
        self.is_sum = False
        self.uniform = False  # made by copying or filling: so far its places are all equal
        self.hints: set[str] = set()


Axis = list[Factor]  # a product, the slowest factor first; empty: size 1


def size_of(axis: Iterable[Factor]) -> int:
    """Number of places."""
    return prod(f.size for f in axis)
