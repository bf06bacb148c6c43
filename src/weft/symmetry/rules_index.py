"""Rules of operations that look up by number: embeddings, top-k, gather and scatter, and fused experts.

A tensor of positions (``Value.indexes``) follows the axis that it points at: a permuted axis has its places elsewhere,
and what looks up in an axis that is permuted alike finds the same. Any other use of a position freezes the axis.
"""

from __future__ import annotations

from weft.symmetry.factors import Axis, size_of
from weft.symmetry.rules import Call, Value, rule

POINTING = ("embedding", "gather", "take_along_dim", "scatter", "scatter_", "scatter_add", "scatter_add_", "index", "one_hot",
            "index_select", "experts", "index_add", "index_add_")  # fmt: skip


def _look_up(call: Call, axis: Axis, index: Value, what: str = "") -> None:
    """Positions point at an axis: it is the one that they came from, or its order is fixed."""
    if index.indexes is not None and size_of(index.indexes) == size_of(axis):
        call.unify(axis, index.indexes)
        return
    if index.indexes is not None:
        call.freeze(index.indexes)
    call.freeze(axis, what or f"looked up by position ({call.name})")


@rule("embedding")
def embedding(call: Call) -> Value:
    """weight (entries, width), indices (…) -> (…, width)."""
    weight, index = call["weight"], call["indices"]
    _look_up(call, weight.axes[0], index, "entries of a table, looked up by number (embedding)")
    call.space.hint(weight.axes[1], "table")
    return Value([*index.axes, weight.axes[1]])


@rule("topk", "sort", "argsort")
def topk(call: Call) -> Value | list[Value]:
    """The largest do not depend on the order, and come sorted; their positions point at the axis."""
    x = call["self"]
    dim = -1 if call["dim"] is None else call["dim"]
    n = call.shapes[0][dim]
    axes = list(x.axes)
    pointed = axes[dim]
    axes[dim] = call.space.axis(n, f"sorted by value ({call.name})")
    if call.name == "argsort":
        return Value(axes, indexes=pointed)
    return [Value(axes), Value(axes, indexes=pointed)]


@rule("gather", "take_along_dim")
def gather(call: Call) -> Value:
    """self[…, index, …] along one axis; the others are those of the index."""
    x, index = call["self"], call["index"] or call["indices"]
    dim = call["dim"] % len(x.axes)
    _look_up(call, x.axes[dim], index)
    _aligned(call, x, index, dim)
    return Value(index.axes)


def _aligned(call: Call, a: Value, b: Value, dim: int) -> None:
    for d, (x, y) in enumerate(zip(a.axes, b.axes)):
        if d == dim:
            continue
        if size_of(x) == size_of(y):
            call.unify(x, y)
        else:
            call.freeze(x)
            call.freeze(y)


@rule("scatter", "scatter_", "scatter_add", "scatter_add_")
def scatter(call: Call) -> Value:
    """self with elements written at positions."""
    x, index, source = call["self"], call["index"], call["src"]
    dim = call["dim"] % len(x.axes)
    _look_up(call, x.axes[dim], index)
    _aligned(call, x, index, dim)
    if isinstance(source, Value):
        for a, b in zip(source.axes, index.axes):
            if size_of(a) == size_of(b):
                call.unify(a, b)
            else:
                call.freeze(a)
                call.freeze(b)
    return Value(x.axes)


@rule("one_hot")
def one_hot(call: Call) -> Value:
    """A new axis with one place for each number."""
    index = call["self"]
    axis = call.space.axis(call.shapes[0][-1])
    _look_up(call, axis, index)
    return Value([*index.axes, axis])


@rule("index_select")
def index_select(call: Call) -> Value:
    """Rows of an axis by number."""
    x, index = call["self"], call["index"]
    dim = call["dim"] % len(x.axes)
    _look_up(call, x.axes[dim], index)
    return Value([*x.axes[:dim], index.axes[0], *x.axes[dim + 1 :]])


@rule("index")
def index(call: Call) -> Value:
    """x[i, :, j]: axes that are looked up go, those of the numbers come in their place."""
    x, indices = call["self"], call["indices"]
    given = [(d, i) for d, i in enumerate(indices) if isinstance(i, Value)]
    if len(call.shapes[0]) != len(x.axes) - len(given) + max(len(i.axes) for _, i in given):
        call.freeze([f for a in x.axes for f in a])  # a mask of booleans
        return Value([call.space.axis(n, "chosen by a mask") for n in call.shapes[0]])
    for d, i in given:
        _look_up(call, x.axes[d], i)
    new = call.broadcast([i for _, i in given])
    places = [d for d, _ in given]
    rest = [a for d, a in enumerate(x.axes) if d not in places]
    together = places == list(range(places[0], places[0] + len(places)))
    at = places[0] if together else 0
    return Value([*rest[:at], *new, *rest[at:]])


@rule("experts")
def experts(call: Call) -> Value:
    """Σ_k weights[t, k] · expert[index[t, k]](hidden[t]); first (e, gate and up, in), down (e, out, inside).

    Experts permute with the rows of their router; inside each expert the axis between its two matrices permutes, the
    halves for gate and up alike, and differently in each.
    """
    hidden, chosen, weights = call["hidden"], call["index"], call["weights"]
    first, down = call["first"].axes, call["down"].axes
    if call["is_transposed"]:
        first, down = [first[0], first[2], first[1]], [down[0], down[2], down[1]]
    call.unify(first[0], down[0])
    _look_up(call, first[0], chosen, "experts that are chosen in a way that was not understood")
    call.broadcast([chosen, weights])
    call.unify(hidden.axes[-1], first[2])
    inside, wide = down[2], first[1]
    if call["has_gate"] and call["is_concatenated"]:
        for half in call.space.slices(wide, (size_of(inside), size_of(inside)), "a slice across factors"):
            call.unify(half, inside)
    elif call["has_gate"]:
        call.unify(wide, [*inside, call.space.fresh(2, "gate and up alternate")])
    else:
        call.unify(wide, inside)
    for bias, axis in ((call["first_bias"], wide), (call["down_bias"], down[1])):
        if bias is not None:
            call.broadcast([bias.axes, [first[0], axis]])
    call.inner.append([*hidden.axes[:-1], first[0], inside])
    call.space.hint(first[0], "experts")
    call.space.hint(inside, "inside")
    call.space.hint([*first[2], *down[1]], "linear")
    return Value([*hidden.axes[:-1], down[1]])
