"""What operations of an exported graph do to a residual stream: which inputs are in the stream that an output is in.

The rules follow one axis, the features. A stream passes sums and whatever moves values along other axes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Source = tuple[Any, int]  # node, feature axis
SAME = {
    "dropout",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "to",
    "_to_copy",
    "type_as",
    "lift_fresh",
    "float",
    "double",
}
RESHAPES = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view"}
SWAPS = {"transpose", "t", "permute", "swapaxes", "numpy_T"}
PICKS = {"slice", "select", "index_select", "narrow", "flip", "roll", "index", "expand", "repeat"}
PARTS = {"split", "split_with_sizes", "chunk", "unbind"}
MOVES = SAME | RESHAPES | SWAPS | PICKS | {"getitem", "cat", "stack"}
NOT_READERS = {"_assert_tensor_metadata", "sym_size", "sym_numel", "sym_stride"}  # they look at shapes only


class Foreign(Exception):
    """What is not a stream, and why."""


@dataclass(frozen=True)
class Writer:
    """Weights whose axis ``axis`` is the stream's feature axis."""

    weight: str
    axis: int
    kind: str  # linear, conv, embedding, tensor; norm: a layer norm, by its path
    bias: str | None = None
    scale: str | None = None  # a gain per feature (LayerScale) after it
    scale_axis: int = 0
    modules: tuple[str, ...] = ()  # embeddings that look the weight up, if it is read elsewhere as well


class Graph:
    """An exported program with the names of its tensors."""

    def __init__(self, model: nn.Module, program: Any):
        self.model = model
        self.nodes = list(program.graph.nodes)
        signature = program.graph_signature
        owners = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        first: dict[int, str] = {}
        same = {}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            same[name] = first.setdefault(id(tensor), name)
        self.tensor = {n: same[owners[n.name]] for n in self.nodes if n.op == "placeholder" and n.name in owners}

    def uses(self, name: str) -> set[Any]:
        """All operations that have a tensor as an argument, under any of its names."""
        return {u for p, n in self.tensor.items() if n == name for u in p.users if kind(u) not in NOT_READERS}


def kind(node: Any) -> str:
    """``aten.add_.Tensor`` -> ``add``."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = str(getattr(packet, "__name__", packet))
    return name if name.startswith("_") else name.rstrip("_")


def where(node: Any) -> str:
    """The module that an operation stands in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"@\d+", "", str(stack[-1][0])) if stack else ""  # @1 marks a second call


def said(node: Any) -> str:
    """An operation in words."""
    if node.op != "call_function":
        return f"{node.name}"
    path = where(node)
    return f"{kind(node)} in {path}" if path else kind(node)


def shape(node: Any) -> tuple[int, ...]:
    """Sizes of a node's output; empty if it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def arguments(node: Any) -> dict[str, Any]:
    """Arguments by name."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return given | dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)


def is_node(item: Any) -> bool:
    """Whether an argument is a tensor of the graph."""
    return isinstance(item, torch.fx.Node) and isinstance(item.meta.get("val"), Tensor)


def sources(node: Any, axis: int) -> list[Source]:
    """Which inputs of an operation are in the stream that its output is in.

    Raises:
        Foreign: the operation is none that a stream passes.
    """
    name, given = kind(node), arguments(node)
    x = given.get("self", given.get("input"))
    if name in SAME:
        return [(x, axis)]
    if name in RESHAPES:
        return [(x, _reshaped(shape(node), axis, shape(x), node))]
    if name in SWAPS:
        return [(x, _swapped(name, given, axis, len(shape(x))))]
    if name in PICKS:
        return [(x, _picked(name, given, node, x, axis))]
    if name == "getitem" and kind(node.args[0]) in PARTS:
        inner = arguments(node.args[0])
        dim = inner["dim"] % len(shape(inner["self"]))
        at = axis + (kind(node.args[0]) == "unbind" and axis >= dim)
        if dim != at:
            return [(inner["self"], at)]
    if name in ("cat", "stack"):
        parts = given["tensors"]
        dim = given["dim"] % len(shape(node))
        if dim != axis:
            return [(part, axis - (name == "stack" and axis > dim)) for part in parts]
    if name in ("add", "sub") and is_node(given["other"]):
        return [_broadcast(part, node, axis) for part in (x, given["other"])]
    if name in ("mul", "div"):
        other = given["other"]
        if not is_node(other) or _size(other, node, axis) == 1:
            return [_broadcast(x, node, axis)]
        if name == "mul" and _size(x, node, axis) == 1:
            return [_broadcast(other, node, axis)]
    if name == "neg":
        return [(x, axis)]
    if name in ("mean", "sum") and given.get("dim"):
        reduced = sorted(d % len(shape(x)) for d in given["dim"])
        before = axis
        for d in reduced:
            before += not given["keepdim"] and d <= before
        if before not in reduced:
            return [(x, before)]
    both = name == "where" and is_node(given.get("self")) and is_node(given["other"])
    if both and _size(given["condition"], node, axis) == 1:
        return [_broadcast(part, node, axis) for part in (x, given["other"])]
    raise Foreign(said(node))


def _reshaped(new: tuple[int, ...], axis: int, old: tuple[int, ...], node: Any) -> int:
    after = math.prod(new[axis + 1 :])
    for i, size in enumerate(old):
        if size == new[axis] and math.prod(old[i + 1 :]) == after:
            return i
    raise Foreign(said(node))


def _swapped(name: str, given: dict[str, Any], axis: int, dims: int) -> int:
    if name == "permute":
        return int(given["dims"][axis]) % dims
    if name in ("t", "numpy_T"):
        return dims - 1 - axis
    first, second = (given[k] % dims for k in (("dim0", "dim1") if "dim0" in given else ("axis0", "axis1")))
    return {first: second, second: first}.get(axis, axis)


def _picked(name: str, given: dict[str, Any], node: Any, x: Any, axis: int) -> int:
    dims, out = len(shape(x)), len(shape(node))
    if name in ("expand", "repeat", "index"):
        at = axis - (out - dims)
        ahead = name != "index" or len(given["indices"]) <= at  # only axes before it are indexed
        if at >= 0 and ahead and shape(x)[at] == shape(node)[axis]:
            return at
        raise Foreign(said(node))
    dim: Any = given.get("dim", given.get("dims"))
    picked = [d % dims for d in (dim if isinstance(dim, list | tuple) else [dim])]
    at = axis + (name == "select" and axis >= picked[0])
    if at in picked or (name == "roll" and not picked):
        raise Foreign(said(node))
    return at


def _size(part: Any, node: Any, axis: int) -> int:
    """Size of an operand along an axis of the result that it is broadcast to."""
    at = axis - (len(shape(node)) - len(shape(part)))
    return shape(part)[at] if at >= 0 else 1


def _broadcast(part: Any, node: Any, axis: int) -> Source:
    if _size(part, node, axis) != shape(node)[axis]:
        raise Foreign(f"{said(node)} adds the same number to all features")
    return part, axis - (len(shape(node)) - len(shape(part)))


def parameter(graph: Graph, node: Any, axis: int) -> tuple[str, int, Any] | None:
    """The tensor of the model that a value is, cast or transposed at most, its axis, and the operation that uses it."""
    user = None
    while node.op == "call_function" and kind(node) in SAME | SWAPS and len(node.users) == 1:
        user = node
        ((node, axis),) = sources(node, axis)
    return (graph.tensor[node], axis, user) if node in graph.tensor else None


def layer(node: Any) -> tuple[Any, Any, int, Any] | None:
    """Input, weight, its output axis and bias of a linear operation; the input axis is the other one."""
    name, given = kind(node), arguments(node)
    if name == "linear":
        return given["input"], given["weight"], 0, given["bias"]
    if name == "addmm" and given["beta"] == given["alpha"] == 1 and len(shape(given["self"])) == 1:
        return given["mat1"], given["mat2"], 1, given["self"]
    if name in ("mm", "matmul"):
        weight = given["mat2" if name == "mm" else "other"]
        return (given["self"], weight, 1, None) if len(shape(weight)) == 2 else None
    return None


def written(graph: Graph, node: Any, axis: int) -> tuple[Writer, set[Any]] | None:
    """The weights that write an operation's output, if it is a layer's, and the operations that use them for it."""
    name, given = kind(node), arguments(node)
    last = axis == len(shape(node)) - 1
    linear = layer(node) if last else None
    if linear is not None:
        _, weight, at, bias = linear
        family = "linear"
    elif name in ("conv1d", "conv2d", "conv3d") and axis == 1:
        weight, at, bias, family = given["weight"], 0, given["bias"], "conv"
    elif name == "embedding" and last:
        weight, at, bias, family = given["weight"], 1, None, "embedding"
    else:
        return _scaled(graph, node, axis) if name == "mul" else None
    found = parameter(graph, weight, at)
    shift = None if bias is None else parameter(graph, bias, 0)
    if found is None or (bias is not None and shift is None):
        if name in ("mm", "matmul"):
            return None
        raise Foreign(f"{said(node)}, whose weights are computed (weft.bake_ makes them plain),")
    used = {node, found[2], shift and shift[2]} - {None}
    modules = (where(node),) if family == "embedding" else ()
    return Writer(found[0], found[1], family, shift and shift[0], modules=modules), used


def _scaled(graph: Graph, node: Any, axis: int) -> tuple[Writer, set[Any]] | None:
    """A layer's output times a gain per feature: the gain goes into the layer."""
    given = arguments(node)
    pair = [given["self"], given["other"]]
    gains = [p for p in pair if p in graph.tensor and math.prod(shape(p)) == shape(node)[axis] == _size(p, node, axis)]
    if len(gains) != 1:
        return None
    gain = gains[0]
    inner, at = _broadcast(pair[1 - pair.index(gain)], node, axis)
    while kind(inner) in SAME | RESHAPES | SWAPS and len(inner.users) == 1:
        ((inner, at),) = sources(inner, at)
    made = written(graph, inner, at) if inner.op == "call_function" and len(inner.users) == 1 else None
    if made is None or made[0].kind not in ("linear", "conv") or made[0].scale:
        return None
    scale_axis = axis - (len(shape(node)) - len(shape(gain)))
    return replace(made[0], scale=graph.tensor[gain], scale_axis=scale_axis), made[1] | {node}
