"""Parts of one tensor that play different roles: query, key and value under an axis of three that is taken apart.

Such an axis p keeps its order, but what stands beside it may permute differently at each of its places: the rows of
the value's third are no longer tied to the query's. While tracing, every factor beside p gets a double for each place;
afterwards a double takes its factor's place if the factor occurs nowhere without p, or is tied to it again if it does.
"""

from __future__ import annotations

from collections.abc import Iterable

from weft.symmetry.axes import Axes
from weft.symmetry.factors import Axis, Factor

Doubles = dict[Factor, dict[Factor, dict[int, Factor]]]  # p -> factor -> place -> double
UNUSED = "not used in the traced call"


class Roles:
    """The axes that were taken apart in a trace, with the doubles of the factors beside them."""

    def __init__(self, space: Axes):
        self.space = space
        self.made: list[tuple[Factor, Factor, int, Factor]] = []
        self.apart: list[Factor] = []

    def takes_apart(self, axis: Axis) -> bool:
        """Whether an axis can be taken apart: one factor that is free, or that was taken apart before."""
        factors = self.space.expand(axis)
        if len(factors) != 1 or factors[0].is_sum:
            return False
        known = [self.space.find(p) for p in self.apart]
        if not factors[0].frozen and factors[0] not in known:
            self.apart.append(factors[0])
            self.space.freeze(factors, "parts with roles of their own")
            return True
        return factors[0] in known

    def place(self, taken: Axis, beside: Axis, index: int) -> Axis:
        """What stands beside one place of an axis that is taken apart."""
        p = self.space.expand(taken)[0]
        found: Axis = []
        for factor in self.space.expand(beside):
            if factor.is_sum or factor.frozen:
                found.append(factor)
                continue
            same = [
                d for q, f, i, d in self.made
                if i == index and self.space.find(q) is p and self.space.find(f) is factor
            ]  # fmt: skip
            double = same[0] if same else self.space.fresh(factor.size)
            if not same:
                double.hints |= factor.hints
                self.made.append((p, factor, index, double))
            found.append(double)
        return found

    def settle(
        self, tensors: Iterable[list[Axis]], operations: list[tuple[list[list[Axis]], list[list[Axis]]]]
    ) -> Doubles:
        """Doubles that stand; all others are tied to their factors again."""
        stored = list(tensors)
        while True:
            table = self._table()
            wrong = [
                (p, f) for p, doubles in table.items() for f in doubles
                if f.parts or f.frozen or not self._stands(p, f, stored, operations)
            ]  # fmt: skip
            if not wrong:
                break
            for p, f in wrong:
                for double in table[p][f].values():
                    self.space.unify([f], [double], "parts of one tensor")
                gone = {id(d) for d in table[p][f].values()}
                self.made = [m for m in self.made if id(m[3]) not in gone]
        for p, doubles in table.items():
            for f, places in doubles.items():
                for i in range(p.size):
                    places.setdefault(i, self.space.fresh(f.size, UNUSED))
        return table

    def _table(self) -> Doubles:
        table: Doubles = {}
        kept = []
        for p, factor, i, double in self.made:
            places = table.setdefault(self.space.find(p), {}).setdefault(self.space.find(factor), {})
            if i in places:
                self.space.unify([places[i]], [double], "parts of one tensor")
            else:
                places[i] = double
                kept.append((p, factor, i, double))
        self.made = kept
        return table

    def _stands(self, p: Factor, f: Factor, stored: list[list[Axis]], operations: list) -> bool:
        for axes in stored:
            tops = [self.space.expand(axis) for axis in axes]
            if any(f in self.space.leaves(axis) for axis in axes):
                together = [top for top in tops if top.count(f) == 1 and top.count(p) == 1]
                if len(together) != 1 or not self._beside(p, f, axes):
                    return False
        for inputs, outputs in operations:
            touched = False
            for axes in [*inputs, *outputs]:
                if any(f in self.space.leaves(axis) for axis in axes):
                    touched = True
                    if not self._beside(p, f, axes):
                        return False
            if touched and any(sum(p in self.space.leaves(a) for a in axes) > 1 for axes in outputs):
                return False
        return True

    def _beside(self, p: Factor, f: Factor, axes: list[Axis]) -> bool:
        """Whether both stand once in a tensor, as factors of whole axes."""
        tops = [g for axis in axes for g in self.space.expand(axis)]
        leaves = [g for axis in axes for g in self.space.leaves(axis)]
        return all(tops.count(g) == leaves.count(g) == 1 for g in (p, f))


def by_place(space: Axes, doubles: Doubles, axes: list[Axis]) -> list[list[Axis]]:
    """A tensor as one for each place of the axes that are taken apart in it."""
    for p, table in doubles.items():
        if any(p in space.expand(axis) for axis in axes):
            one = [
                [[table[f][i] if f in table else f for f in space.expand(axis) if f is not p] for axis in axes]
                for i in range(p.size)
            ]
            return [
                done for part in one for done in by_place(space, {q: t for q, t in doubles.items() if q is not p}, part)
            ]
    return [axes]
