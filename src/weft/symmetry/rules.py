"""What an operation does to axes: the rules' table, and those for operations on every element and for new tensors.

A rule takes a :class:`Call` and returns the axes of its result, unifying or freezing on the way. It holds if permuting
the factors of the inputs permutes those of the output in the same way and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from weft.symmetry.axes import Axes
from weft.symmetry.factors import Axis, size_of
from weft.symmetry.roles import Roles


@dataclass
class Value:
    """A tensor in a trace: its axes; ``indexes`` is the axis that its elements are places of (after a top-k)."""

    axes: list[Axis]
    indexes: Axis | None = None
    constant: bool = False  # of equal elements, or a weight
    shape: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        self.shape = self.shape or tuple(size_of(a) for a in self.axes)


@dataclass
class Call:
    """One operation with its arguments by name; tensors are :class:`Value`."""

    space: Axes
    roles: Roles
    name: str
    arguments: dict[str, Any]
    shapes: list[tuple[int, ...]]
    inner: list[list[Axis]] = field(default_factory=list)  # tensors that exist only inside of the operation
    why: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def values(self) -> list[Value]:
        """All tensors among the arguments."""
        return [v for a in self.arguments.values() for v in (a if isinstance(a, list | tuple) else [a]) if is_value(v)]

    def freeze(self, axis: Axis, reason: str = "") -> None:
        """Fix an axis; by default since this operation depends on its order."""
        self.space.freeze(axis, reason or f"order matters to {self.name}{self.why}")

    def unify(self, a: Axis, b: Axis) -> None:
        """Two axes permute together."""
        self.space.unify(a, b, f"in {self.name}{self.why}")

    def broadcast(self, values: Sequence[Value | list[Axis]]) -> list[Axis]:
        """Unify axes that are aligned at the right, as broadcasting does."""
        lists = [v.axes if isinstance(v, Value) else v for v in values]
        out: list[Axis] = []
        for i in range(max(map(len, lists), default=0)):
            aligned = [axes[len(axes) - 1 - i] for axes in lists if i < len(axes)]
            wide = [a for a in aligned if self.space.expand(a)]
            written = aligned[:1] if self.name.endswith("_") else []  # in place: what else sees it must follow
            real = [a for a in wide if a in written or not self.space.is_uniform(a)] or wide[:1]
            for other in real[1:]:
                self.unify(real[0], other)
            out.append(real[0] if real else [])
        return out[::-1]

    def mixes(self, value: Value, dims: Sequence[int]) -> None:
        """Places of some axes meet, for each place of the others: there is a tensor inside without those axes."""
        gone = {d % max(len(value.axes), 1) for d in dims}
        self.inner.append([a for d, a in enumerate(value.axes) if d not in gone])

    def dims(self, value: Value, name: str = "dim") -> list[int]:
        """Axes by number from an argument; all if it is absent."""
        dims = self[name]
        if dims is None or dims == []:
            return list(range(len(value.axes)))
        return [d % max(len(value.axes), 1) for d in ([dims] if isinstance(dims, int) else dims)]


def is_value(item: Any) -> bool:
    """Whether an argument is a tensor of the trace."""
    return isinstance(item, Value)


Rule = Callable[[Call], "Value | list[Value]"]
RULES: dict[str, Rule] = {}
# operations that pass on what an integer tensor points at
KEEPS_INDEXES: set[str] = set()
# on each element, though torch does not tag them so
POINTWISE = {
    "where",
    "masked_fill",
    "add",
    "mul",
    "sub",
    "div",
    "__and_",
    "__or_",
    "__xor_",
    "__and__",
    "__or__",
    "__xor__",
}


def rule(*names: str, keeps_indexes: bool = False) -> Callable[[Rule], Rule]:
    """Enter a rule under the names of operations, as ``aten.<name>``."""

    def enter(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        if keeps_indexes:
            KEEPS_INDEXES.update(names)
        return function

    return enter


def pointwise(call: Call) -> Value:
    """An operation on each element: aligned axes are one; what one operand lacks, the other gives."""
    values = call.values()
    if call.name in ("add", "add_", "sub"):
        _mark_stream(call, [v for v in values if not v.constant])
    return Value(call.broadcast(values), constant=all(v.constant for v in values))


def _mark_stream(call: Call, values: list[Value]) -> None:
    """A sum of two activations that had nothing to do with each other is a residual stream."""
    if len(values) == 2 and all(len(v.axes) > 1 for v in values):
        for a, b in zip(*(reversed(v.axes) for v in values)):
            left, right = call.space.leaves(a), call.space.leaves(b)
            if left and right and size_of(left) == size_of(right) and left != right:
                call.space.hint([*left, *right], "hidden")


@rule(
    "contiguous", "clone", "to", "_to_copy", "detach", "detach_", "alias", "lift_fresh_copy", "lift_fresh", "type_as",
    "dropout", "feature_dropout", "alpha_dropout", "positive", "cpu", "float", "requires_grad_", "_assert_tensor_metadata",
    keeps_indexes=True,
)  # fmt: skip
def same(call: Call) -> Value:
    """Nothing happens to elements in evaluation."""
    value = next(v for v in (call["self"], call["input"], call["a"]) if v is not None)
    return Value(value.axes, value.indexes, value.constant)


@rule("copy_", "fill_", "zero_", "index_fill_")
def written(call: Call) -> Value:
    """A tensor is written over, and all tensors that it is a view of with it."""
    if call.name == "index_fill_":
        call.freeze(call["self"].axes[call["dim"]])
    call.broadcast(call.values())
    return Value(call["self"].axes)


@rule(
    "zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "scalar_tensor", "new_empty_strided", "empty_strided",
)  # fmt: skip
def uniform(call: Call) -> Value:
    """Equal elements: no order to keep."""
    return Value([call.space.copies(n) for n in call.shapes[0]], constant=True)


@rule(
    "arange",
    "linspace",
    "logspace",
    "eye",
    "tril_indices",
    "triu_indices",
    "rand",
    "randn",
    "randint",
    "_tensor_constant",
)
def ordered(call: Call) -> Value:
    """Elements that differ by position."""
    return Value([call.space.axis(n, f"positions ({call.name})") for n in call.shapes[0]], constant=True)


@rule("outer", "ger")
def outer(call: Call) -> Value:
    """Every element with every other."""
    return Value([call["self"].axes[0], next(v for v in (call["vec2"], call["other"]) if v is not None).axes[0]])


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax(call: Call) -> Value:
    """Normalised over an axis, whatever its order."""
    value = call["self"]
    if len(value.axes) >= 4:
        call.space.hint(value.axes[-3], "heads")
    call.mixes(value, [call["dim"]])
    return Value(value.axes)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "diff", "flip", "roll", "tril", "triu", "cumsum_")
def along(call: Call) -> Value:
    """Order along an axis matters."""
    value = call["self"]
    names = {"flip": "dims", "roll": "dims"}
    dims = [-1, -2] if call.name in ("tril", "triu") else call.dims(value, names.get(call.name, "dim"))
    call.mixes(value, dims)
    for d in dims:
        call.freeze(value.axes[d])
    same_size = zip(value.axes, call.shapes[0])
    reason = f"order matters to {call.name}"
    return Value([a if size_of(a) == n else call.space.axis(n, reason) for a, n in same_size])


@rule(
    "sum", "mean", "amax", "amin", "prod", "var", "std", "any", "all", "logsumexp", "linalg_vector_norm", "norm", "nansum",
    "count_nonzero", "var_mean", "std_mean", "max", "min", "argmax", "argmin", "aminmax", "median", "mode",
)  # fmt: skip
def reduction(call: Call) -> Value | list[Value]:
    """Symmetric in the elements of an axis, which goes; a position that is returned points at it."""
    value = call["self"]
    if is_value(call["other"]):  # max(a, b), element by element
        return pointwise(call)
    dims = call.dims(value)
    gone = [a for d in dims for a in value.axes[d]]
    if call["keepdim"]:
        axes = [[] if d in dims else a for d, a in enumerate(value.axes)]
    else:
        axes = [a for d, a in enumerate(value.axes) if d not in dims]
    if call.name in ("argmax", "argmin"):
        return Value(axes, indexes=gone)
    if len(call.shapes) == 2:
        points = call.name in ("max", "min", "median", "mode")
        return [Value(axes), Value(axes, indexes=gone if points else None)]
    return Value(axes)


def is_pointwise(target: Any) -> bool:
    """Whether torch says that an operation works on each element."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target.overloadpacket.__name__.removesuffix("_")
    return torch.Tag.pointwise in target.tags or name in POINTWISE
