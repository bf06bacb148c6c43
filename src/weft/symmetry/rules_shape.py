"""Rules of operations that move, cut and join axes."""

from __future__ import annotations

from typing import Any

from weft.symmetry.factors import Axis, Misaligned, size_of
from weft.symmetry.rules import Call, Value, rule


@rule(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze", "squeeze_",
    "unsqueeze_", "_reshape_alias", "ravel", keeps_indexes=True,
)  # fmt: skip
def view(call: Call) -> Value:
    """The same places in other axes."""
    value, shape = call["self"], call.shapes[0]
    if value.constant and 1 in (len(shape), len(value.shape)) and size_of(_all(value)) == 1:
        return Value([[] for _ in shape], value.indexes, value.constant)
    try:
        return Value(call.space.regroup(_all(value), shape), value.indexes, value.constant)
    except Misaligned:
        return _cut_anew(call, value, shape)


def _all(value: Value) -> Axis:
    return [f for axis in value.axes for f in axis]


def _cut_anew(call: Call, value: Value, shape: tuple[int, ...]) -> Value:
    reason = f"a view across factors{call.why}"
    call.freeze(_all(value), reason)
    return Value([call.space.axis(n, reason) for n in shape])


@rule("transpose", "t", "permute", "movedim", "swapaxes", "numpy_T", "mT", "adjoint", "transpose_", keeps_indexes=True)
def moved(call: Call) -> Value:
    """Axes change places."""
    value = call["self"]
    order = list(range(len(value.axes)))
    if call.name == "permute":
        order = call.dims(value, "dims")
    elif call.name == "movedim":
        source, target = call["source"], call["destination"]
        pairs = [(source, target)] if isinstance(source, int) else list(zip(source, target))
        fixed = {t % len(order): s % len(order) for s, t in pairs}
        rest = iter([i for i in order if i not in fixed.values()])
        order = [fixed[i] if i in fixed else next(rest) for i in order]
    elif call.name == "numpy_T":
        order = order[::-1]
    elif len(order) >= 2:
        named = call.name in ("transpose", "swapaxes", "transpose_")
        first = call["dim0"] if call["dim0"] is not None else call["axis0"]
        second = call["dim1"] if call["dim1"] is not None else call["axis1"]
        a, b = (first, second) if named else (-2, -1)
        a, b = a % len(order), b % len(order)
        order[a], order[b] = order[b], order[a]
    return Value([value.axes[i] for i in order], value.indexes, value.constant)


@rule("expand", "expand_as", "broadcast_to", keeps_indexes=True)
def expand(call: Call) -> Value:
    """Equal copies along an axis have no order to keep."""
    value, shape = call["self"], call.shapes[0]
    missing = len(shape) - len(value.axes)
    axes = [[] for _ in range(missing)] + value.axes
    return Value(
        [a if size_of(a) == n else call.space.copies(n) for a, n in zip(axes, shape)], value.indexes, value.constant
    )


@rule("repeat", "tile", "repeat_interleave")
def repeat(call: Call) -> Value:
    """Copies of an axis: one factor more, outside (repeat) or inside (repeat_interleave)."""
    value, shape = call["self"], call.shapes[0]
    axes = [[] for _ in range(len(shape) - len(value.axes))] + value.axes
    found = []
    for axis, n in zip(axes, shape):
        copies = call.space.copies(n // max(size_of(axis), 1))
        found.append(axis + copies if call.name == "repeat_interleave" else copies + axis)
    if call.name == "repeat_interleave" and not isinstance(call["repeats"], int):
        return _cut_anew(call, value, shape)
    return Value(found)


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Value:
    """One axis after another."""
    values = [v for v in call["tensors"] if v.shape != (0,)]
    dim = call["dim"] % len(values[0].axes)
    axes = call.broadcast([[a for d, a in enumerate(v.axes) if d != dim] for v in values])
    axes.insert(dim, [call.space.concatenate([v.axes[dim] for v in values])])
    return Value(axes, constant=all(v.constant for v in values))


@rule("stack")
def stack(call: Call) -> Value:
    """Tensors along a new axis, whose order is theirs."""
    values = call["tensors"]
    axes = call.broadcast(values)
    axes.insert(call["dim"] % (len(axes) + 1), call.space.axis(len(values), "tensors in their order (stack)"))
    return Value(axes)


def _replace(value: Value, dim: int, axis: Axis) -> Value:
    return Value([*value.axes[:dim], axis, *value.axes[dim + 1 :]], value.indexes, value.constant)


@rule(
    "split", "split_with_sizes", "chunk", "tensor_split", "hsplit", "vsplit", "unsafe_chunk", "unsafe_split",
    "split_with_sizes_copy", keeps_indexes=True,
)  # fmt: skip
def split(call: Call) -> list[Value]:
    """Pieces of an axis."""
    value = call["self"]
    dim = (call["dim"] or 0) % len(value.axes)
    pieces = call.space.slices(value.axes[dim], [s[dim] for s in call.shapes], f"a slice across factors{call.why}")
    return [_replace(value, dim, piece) for piece in pieces]


@rule("slice", "narrow", keeps_indexes=True)
def slice_(call: Call) -> Value:
    """One piece of an axis; steps freeze it."""
    value = call["self"]
    dim = (call["dim"] or 0) % len(value.axes)
    size, n = size_of(value.axes[dim]), call.shapes[0][dim]
    if n == size:
        return Value(value.axes, value.indexes, value.constant)
    if (call["step"] or 1) != 1 or n == 0 or not isinstance(call["start"] or 0, int):
        call.freeze(value.axes[dim])
        return _replace(value, dim, call.space.axis(n, f"order matters to {call.name}{call.why}"))
    return _replace(value, dim, _piece(call, value.axes[dim], call["start"] or 0, n))


def _piece(call: Call, axis: Axis, start: int, n: int) -> Axis:
    size = size_of(axis)
    start = max(start + size, 0) if start < 0 else min(start, size)
    sizes = [s for s in (start, n, size - start - n) if s]
    return call.space.slices(axis, sizes, f"a slice across factors{call.why}")[1 if start else 0]


@rule("select", keeps_indexes=True)
def select(call: Call) -> Value:
    """One place of an axis, which goes."""
    value = call["self"]
    dim = call["dim"] % len(value.axes)
    if not isinstance(call["index"], int):
        call.freeze(value.axes[dim])
        return Value([a for d, a in enumerate(value.axes) if d != dim], value.indexes, value.constant)
    return _place(call, value, dim, call["index"] % max(size_of(value.axes[dim]), 1))


def _place(call: Call, value: Value, dim: int, index: int) -> Value:
    """A tensor at one place of an axis."""
    rest = [a for d, a in enumerate(value.axes) if d != dim]
    if call.roles.takes_apart(value.axes[dim]):
        rest = [call.roles.place(value.axes[dim], axis, index) for axis in rest]
    elif size_of(value.axes[dim]) > 1:
        _piece(call, value.axes[dim], index, 1)
    return Value(rest, value.indexes, value.constant)


@rule("unbind")
def unbind(call: Call) -> list[Value]:
    """Every place of an axis on its own."""
    value = call["self"]
    dim = (call["dim"] or 0) % len(value.axes)
    return [_place(call, value, dim, i) for i in range(len(call.shapes))]


@rule("glu")
def glu(call: Call) -> Value:
    """First half times the sigmoid of the second."""
    value = call["self"]
    dim = call.dims(value)[0] if call["dim"] is not None else len(value.axes) - 1
    n = size_of(value.axes[dim]) // 2
    first, second = call.space.slices(value.axes[dim], (n, n), f"a slice across factors{call.why}")
    call.unify(first, second)
    return _replace(value, dim, first)


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Value:
    """Equal elements before and after."""
    value, pads = call["self"], list(call["pad"])
    axes: list[Axis] = list(value.axes)
    constant = call["mode"] in (None, "constant")
    for i in range(len(pads) // 2):
        before, after = pads[2 * i], pads[2 * i + 1]
        d = len(axes) - 1 - i
        if before == after == 0:
            continue
        if before < 0 or after < 0 or not constant:
            call.freeze(axes[d])
            axes[d] = call.space.axis(call.shapes[0][d], f"order matters to {call.name}")
            continue
        pieces: list[Any] = [
            call.space.copies(before) if before else None,
            axes[d],
            call.space.copies(after) if after else None,
        ]
        axes[d] = [call.space.concatenate([p for p in pieces if p is not None])]
    return Value(axes)
