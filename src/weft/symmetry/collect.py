"""From traced axes to groups: where every factor lies, which permute inside of others, and what they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile

from weft.symmetry.axes import Axes
from weft.symmetry.factors import Axis, Factor, size_of
from weft.symmetry.groups import Frozen, Group, Loop, Member, Symmetry
from weft.symmetry.roles import by_place
from weft.symmetry.trace import Traced

Place = tuple[str, int, int, int, tuple[tuple[int, int, Factor | None], ...]]
HEADS = ("heads", "key_value_heads", "query_heads")


def collect(traced: Traced) -> Symmetry:
    """Groups, frozen factors and unknown operations of a trace."""
    places: dict[Factor, list[Place]] = {}
    frozen: list[Frozen] = []
    for name, axes in traced.tensors.items():
        for number, axis in enumerate(axes):
            for leaf, start, stride, loops in _places(traced, axis):
                if leaf.frozen and leaf.size > 1:
                    frozen.append(Frozen(name, number, leaf.size, leaf.frozen))
                elif leaf.size > 1:
                    places.setdefault(leaf, []).append((name, number, start, stride, loops))
    within = _within(traced, set(places))
    order = _order(within, list(places))
    kinds = {leaf: _kind(leaf, within, places[leaf], traced) for leaf in places}
    names = _names({leaf: (kinds[leaf], [p[0] for p in places[leaf]]) for leaf in order})
    groups = tuple(
        Group(
            names[leaf], kinds[leaf], leaf.size,
            tuple(Member(t, a, start, stride, _loops(loops, names)) for t, a, start, stride, loops in places[leaf]),
            tuple(names[p] for p in order if p in within[leaf]),
        )
        for leaf in order
    )  # fmt: skip
    shapes = {name: tuple(size_of(a) for a in axes) for name, axes in traced.tensors.items()}
    unknown = tuple(sorted(traced.unknown.items()))
    return Symmetry(groups, tuple(frozen), unknown, shapes, dict(traced.aliases))


def _loops(loops: Iterable[tuple[int, int, Factor | None]], names: dict[Factor, str]) -> tuple[Loop, ...]:
    return tuple(Loop(n, stride, names.get(f, "") if f else "") for n, stride, f in loops)


def _strided(space: Axes, axis: Iterable[Factor], unit: int) -> list[tuple[Factor, int]]:
    """Factors of an axis with their strides."""
    factors = space.expand(axis)
    return [(f, unit * size_of(factors[i + 1 :])) for i, f in enumerate(factors)]


def _places(
    traced: Traced, axis: Axis, start: int = 0, unit: int = 1, loops: tuple[tuple[int, int, Factor | None], ...] = ()
) -> Iterator[tuple[Factor, int, int, tuple[tuple[int, int, Factor | None], ...]]]:
    """Every leaf of an axis with its start, its stride and the other factors around it."""
    pairs = _strided(traced.space, axis, unit)
    taken = next(((f, stride) for f, stride in pairs if f in traced.doubles), None)
    if taken is None:
        yield from _places_of(traced, pairs, start, loops)
        return
    table = traced.doubles[taken[0]]
    for i in range(taken[0].size):
        rest = [(table[f][i] if f in table else f, stride) for f, stride in pairs if f is not taken[0]]
        opened = [pair for f, stride in rest for pair in _strided(traced.space, [f], stride)]
        yield from _places_of(traced, opened, start + i * taken[1], loops)


def _places_of(
    traced: Traced, pairs: list[tuple[Factor, int]], start: int, loops: tuple[tuple[int, int, Factor | None], ...]
) -> Iterator[tuple[Factor, int, int, tuple[tuple[int, int, Factor | None], ...]]]:
    for i, (factor, stride) in enumerate(pairs):
        around = [(f.size, s, None if f.is_sum else f) for j, (f, s) in enumerate(pairs) if j != i]
        inner = tuple(sorted([*loops, *around], key=lambda loop: -loop[1]))
        if not factor.is_sum:
            yield factor, start, stride, inner
            continue
        offset = start
        for term in traced.space.terms(factor):
            yield from _places(traced, [term], offset, stride, inner)
            offset += term.size * stride


def _around(space: Axes, axis: Axis, context: Counter[Factor]) -> Iterator[tuple[Factor, Counter[Factor]]]:
    """Every leaf of an axis with the leaves that each of its places has a place in as well."""
    factors = space.expand(axis)
    plain = Counter(f for f in factors if not f.is_sum)
    for factor in factors:
        beside = context + plain
        if not factor.is_sum:
            beside[factor] -= 1
            yield factor, beside
        else:
            for term in space.terms(factor):
                yield from _around(space, [term], beside)


def _within(traced: Traced, free: set[Factor]) -> dict[Factor, set[Factor]]:
    """The factors p such that a factor may permute differently in each place of p.

    That holds if p stands beside it, once, in every tensor of the model and of the trace that has it, and if no
    operation on it makes a tensor that has p in two axes (it would meet itself at two different places of p).
    """
    space = traced.space
    found: dict[Factor, set[Factor]] = {}
    for inputs, outputs in traced.records:
        twice: set[Factor] = set()
        touched: set[Factor] = set()
        given = [part for axes in inputs for part in by_place(space, traced.doubles, axes)]
        made = [part for axes in outputs for part in by_place(space, traced.doubles, axes)]
        for i, axes in enumerate([*given, *made]):
            tops = [Counter(f for f in space.expand(axis) if not f.is_sum) for axis in axes]
            everywhere: Counter[Factor] = sum(tops, Counter())
            leaves = [set(space.leaves(axis)) & free for axis in axes]
            counts = Counter(f for axis in leaves for f in axis)
            twice |= {f for f, n in counts.items() if n > 1}
            if i < len(given):
                touched.update(*leaves)
            for axis, own in zip(axes, tops):
                for leaf, beside in _around(space, axis, everywhere - own):
                    if leaf in free:
                        once = {f for f, n in beside.items() if n == 1 and f in free and f is not leaf}
                        found[leaf] = found[leaf] & once if leaf in found else once
        if twice:
            for leaf in touched & set(found):
                found[leaf] = found[leaf] - twice
    for leaf in free:
        found.setdefault(leaf, set())
    parents = {
        leaf: {p for p in found[leaf] if leaf not in found[p] or p.number < leaf.number} for leaf in free
    }  # of two that are always together, the one that was found first is outside
    for leaf in sorted(free, key=lambda f: len(parents[f])):
        parents[leaf] = {p for p in parents[leaf] if parents[p] <= parents[leaf]}
    return {leaf: parents[leaf] for leaf in free}


def _order(within: dict[Factor, set[Factor]], found: list[Factor]) -> list[Factor]:
    """Factors as they were found, each after those that it lies within."""
    order: list[Factor] = []

    def add(leaf: Factor) -> None:
        if leaf not in order:
            for parent in sorted(within[leaf], key=found.index):
                add(parent)
            order.append(leaf)

    for leaf in found:
        add(leaf)
    return order


def _kind(leaf: Factor, within: dict[Factor, set[Factor]], places: list[Place], traced: Traced) -> str:
    hints = leaf.hints
    for hint, kind in (("experts", "experts"), ("inside", "intermediate"), ("head_dim", "head_dim")):
        if hint in hints:
            return kind
    outside = [p for p in within[leaf] if "heads" in p.hints]
    if "heads" in hints:
        inside = [f for f, parents in within.items() if leaf in parents and "heads" in f.hints]
        return "query_heads" if outside else "key_value_heads" if inside else "heads"
    if outside:
        return "head_dim"
    if "conv" in hints:
        dimensions = [len(traced.tensors[p[0]]) for p in places]
        if sum(d > 2 for d in dimensions) >= sum(d == 2 for d in dimensions):
            return "channels"
    if "hidden" in hints or "table" in hints:
        return "hidden"
    return "intermediate" if "linear" in hints else "axis"


def _names(groups: dict[Factor, tuple[str, list[str]]]) -> dict[Factor, str]:
    """The modules that a group's tensors share and its kind; if that is not unique, its first tensor's module."""

    def shared(tensors: list[str]) -> str:
        parts = [t.split(".")[:-1] for t in tensors]
        same = takewhile(lambda at: len(set(at)) == 1, zip(*parts))
        return ".".join(at[0] for at in same)

    def named(path: str, kind: str) -> str:
        return path if path.rpartition(".")[2] == kind else f"{path}.{kind}" if path else kind

    first = {leaf: named(shared(tensors), kind) for leaf, (kind, tensors) in groups.items()}
    count = Counter(first.values())
    names: dict[Factor, str] = {}
    taken: Counter[str] = Counter()
    for leaf, (kind, tensors) in groups.items():
        name = first[leaf]
        if count[name] > 1 or (not shared(tensors) and kind != "hidden"):
            name = named(tensors[0].rpartition(".")[0], kind)
        taken[name] += 1
        names[leaf] = name if taken[name] == 1 else f"{name}.{taken[name]}"
    return names
