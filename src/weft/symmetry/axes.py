"""Factored axes: an axis is a product of factors, a factor may turn out to be a product or a concatenation of others.

A trace gives every axis of every tensor factors; operations say which factors are one and the same (:meth:`unify`), cut
them by a view (a product) or by a slice (a concatenation), and freeze those whose order matters. All tensors that share
a factor see the finer structure at once. What cannot be expressed is frozen, which is always right: a frozen factor
just stays in its order.

>>> space = Axes()
>>> rows = [space.fresh(12)]
>>> [[f.size for f in axis] for axis in space.regroup(rows, (3, 4))]
[[3], [4]]
>>> [f.size for f in space.expand(rows)]
[3, 4]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from weft.symmetry.factors import Axis, Factor, Misaligned, size_of


class Axes:
    """All factors of one trace."""

    def __init__(self) -> None:
        self._count = 0

    def fresh(self, size: int, frozen: str = "") -> Factor:
        """A new factor, frozen if a reason is given."""
        self._count += 1
        return Factor(size, self._count, frozen)

    def axis(self, size: int, frozen: str = "") -> Axis:
        """A new axis of one factor, or of none for size 1."""
        return [self.fresh(size, frozen)] if size != 1 else []

    def copies(self, size: int) -> Axis:
        """A new axis of equal places."""
        axis = self.axis(size)
        for factor in axis:
            factor.uniform = True
        return axis

    def is_uniform(self, axis: Iterable[Factor]) -> bool:
        """Whether all places of an axis are equal, so that it fits any order."""
        return all(leaf.uniform and not leaf.frozen for leaf in self.leaves(axis))

    def find(self, factor: Factor) -> Factor:
        """What stands for a factor after all unifications."""
        root = factor
        while root.parent is not None:
            root = root.parent
        while factor is not root:
            assert factor.parent is not None
            factor.parent, factor = root, factor.parent
        return root

    def expand(self, axis: Iterable[Factor]) -> Axis:
        """The finest product known: leaves and concatenations, without those of size 1."""
        found: Axis = []
        for factor in axis:
            root = self.find(factor)
            if root.parts and not root.is_sum:
                found += self.expand(root.parts)
            elif root.size != 1:
                found.append(root)
        return found

    def terms(self, factor: Factor) -> list[Factor]:
        """The parts of a concatenation, nested ones opened."""
        root = self.find(factor)
        if root.is_sum:
            return [t for part in root.parts for t in self.terms(part)]
        inner = self.expand([root])
        return self.terms(inner[0]) if len(inner) == 1 and inner[0].is_sum else [root]

    def leaves(self, axis: Iterable[Factor]) -> list[Factor]:
        """All factors that have no parts, in order, with repetitions."""
        found = []
        for factor in self.expand(axis):
            found += [leaf for t in factor.parts for leaf in self.leaves([t])] if factor.is_sum else [factor]
        return found

    def freeze(self, axis: Iterable[Factor], reason: str) -> None:
        """Fix the order of all places; the first reason is kept."""
        for leaf in self.leaves(axis):
            leaf.frozen = leaf.frozen or reason

    def hint(self, axis: Iterable[Factor], hint: str) -> None:
        """Note what an axis is, for its name."""
        for leaf in self.leaves(axis):
            leaf.hints.add(hint)

    def one(self, axis: Iterable[Factor]) -> Factor:
        """An axis as one factor."""
        factors = self.expand(axis)
        if len(factors) == 1:
            return factors[0]
        factor = self.fresh(size_of(factors), "" if factors else "a single place")
        factor.parts = factors
        return factor

    def _parts(self, factor: Factor, sizes: Sequence[int]) -> list[Factor]:
        """New factors that are what a factor is."""
        parts = [self.fresh(n, factor.frozen) for n in sizes]
        for part in parts:
            part.hints |= factor.hints
            part.uniform = factor.uniform
        return parts

    def _cut(self, factor: Factor, outer: int) -> tuple[Axis, Axis]:
        """A leaf or concatenation as (outer, size / outer)."""
        if factor.size % outer:
            raise Misaligned(f"a factor of {factor.size} has no part of {outer}")
        inner = factor.size // outer
        if not factor.is_sum:
            factor.parts = self._parts(factor, (outer, inner))
            return self.expand(factor.parts[:1]), self.expand(factor.parts[1:])
        outers, inners = [], []
        for term in self.terms(factor):
            if term.size % inner:
                raise Misaligned(f"a part of {term.size} is no multiple of {inner}")
            head, tail = self.regroup([term], (term.size // inner, inner))
            outers.append(head)
            inners.append(tail)
        for other in inners[1:]:
            self.unify(inners[0], other, "parts of one tensor that are cut alike")
        return [self.concatenate(outers)], self.expand(inners[0])

    def regroup(self, axis: Iterable[Factor], sizes: Sequence[int]) -> list[Axis]:
        """Places in their order as several axes (or, with one size, as one).

        Raises:
            Misaligned: the factors' boundaries do not fit.
        """
        queue = self.expand(axis)
        found = []
        for size in sizes:
            taken: Axis = []
            rest = size
            while rest > 1:
                if not queue:
                    raise Misaligned("fewer places than asked for")
                factor, *queue = self.expand(queue)
                if rest % factor.size == 0:
                    taken.append(factor)
                    rest //= factor.size
                elif factor.size % rest == 0:
                    head, tail = self._cut(factor, rest)
                    taken += head
                    queue = tail + queue
                    rest = 1
                else:
                    raise Misaligned(f"a factor of {factor.size} does not fit into {rest}")
            found.append(taken)
        if self.expand(queue):
            raise Misaligned("more places than asked for")
        return found

    def slices(self, axis: Axis, sizes: Sequence[int], reason: str = "a slice across factors") -> list[Axis]:
        """Consecutive pieces; factors that a piece ends inside of are frozen."""
        factors = self.expand(axis)
        if len(sizes) == 1 or not factors:
            return [factors if n else [self.fresh(0)] for n in sizes]
        if len(factors) == 1:
            return self._slices(factors[0], sizes, reason)
        inner = size_of(factors[1:])
        if any(n % inner for n in sizes):
            self.freeze(factors, reason)
            return [self.axis(n, reason) for n in sizes]
        return [
            [*head, *factors[1:]] if n else [self.fresh(0)]
            for head, n in zip(self.slices(factors[:1], [n // inner for n in sizes], reason), sizes)
        ]

    def _slices(self, factor: Factor, sizes: Sequence[int], reason: str) -> list[Axis]:
        if not factor.is_sum:
            pieces = self._parts(factor, sizes)
            factor.parts, factor.is_sum = [p for p in pieces if p.size], True
            return [[p] if p.size != 1 else [] for p in pieces]
        terms = self.terms(factor)
        ends = list(accumulate(sizes))
        cuts, start = [], 0
        for term in terms:  # first refine the parts so that every end is a boundary
            inside = [e - start for e in ends if start < e < start + term.size]
            bounds = [0, *inside, term.size]
            steps = [b - a for a, b in pairwise(bounds)]
            cuts += [self.one(piece) for piece in self.slices([term], steps, reason)] if inside else [term]
            start += term.size
        factor.parts = cuts
        found: list[Axis] = []
        rest = iter(cuts)
        for n in sizes:
            run: list[Factor] = []
            while sum(p.size for p in run) < n:
                run.append(next(rest))
            found.append([self.concatenate([[p] for p in run])] if n else [self.fresh(0)])
        return found

    def concatenate(self, pieces: Sequence[Axis]) -> Factor:
        """Axes one after another as one factor."""
        parts = [p for p in (self.one(piece) for piece in pieces) if p.size]
        if len(parts) == 1:
            return parts[0]
        factor = self.fresh(sum(p.size for p in parts))
        factor.parts, factor.is_sum = parts, True
        return factor

    def unify(self, a: Iterable[Factor], b: Iterable[Factor], reason: str) -> None:
        """Two axes of one size permute together from now on; where their factors do not match, both freeze."""
        left, right = self.expand(a), self.expand(b)
        while left and right:
            left, right = self.expand(left), self.expand(right)
            x, y = left[0], right[0]
            try:
                if x is y or x.size == y.size:
                    left, right = left[1:], right[1:]
                    self._unify(x, y, reason)
                elif x.size > y.size:
                    head, tail = self._cut(x, y.size)
                    left = head + tail + left[1:]
                else:
                    head, tail = self._cut(y, x.size)
                    right = head + tail + right[1:]
            except Misaligned:
                break
        if left or right:
            why = f"factors that do not match: {reason}"
            self.freeze(left, why)
            self.freeze(right, why)

    def _unify(self, x: Factor, y: Factor, reason: str) -> None:
        if x is y:
            return
        if x.is_sum and y.is_sum:
            ends = sorted({e for f in (x, y) for e in accumulate(t.size for t in self.terms(f))})
            sizes = [b - a for a, b in zip([0, *ends], ends)]
            for a, b in zip(self.slices([x], sizes, reason), self.slices([y], sizes, reason)):
                self.unify(a, b, reason)
            return
        if x.is_sum:
            x, y = y, x
        x.parent = y
        for leaf in self.leaves([y]):
            leaf.uniform = leaf.uniform and x.uniform
            leaf.hints |= x.hints
        if x.frozen:
            self.freeze([y], x.frozen)
