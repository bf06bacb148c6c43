"""Find the residual streams of a traced model: what writes into each, and that only layer norms read it.

A value is in a stream if it is a sum of what layers write, moved about. :mod:`weft.normalize._stream_rules` says, for
the feature axis of an operation's output, which of its inputs are in the same stream, and at which axis. The rules are
followed backwards and, by asking each user of a value whether it has the value as a source, forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.normalize._stream_rules import (
    MOVES,
    NOT_READERS,
    PARTS,
    Foreign,
    Graph,
    Source,
    Writer,
    arguments,
    kind,
    layer,
    parameter,
    said,
    shape,
    sources,
    where,
    written,
)

UNNORMALIZED = "reads it without a LayerNorm"


@dataclass(frozen=True)
class Reader:
    """A linear layer behind a norm; ``axis`` of the weight is the feature axis."""

    weight: str
    axis: int
    bias: str | None


@dataclass(frozen=True)
class Norm:
    """A layer norm that reads a stream, with all that reads its output, or why that cannot take its gain."""

    path: str
    readers: tuple[Reader, ...] | None
    reason: str = ""


@dataclass
class Stream:
    """One residual stream."""

    width: int
    writers: list[Writer] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)


def find_streams(graph: Graph) -> tuple[list[Stream], list[str]]:
    """All streams that layer norms read.

    Returns:
        Streams, and the layer norms that read something else.

    Raises:
        RecipeError: a residual stream is read or written by something that does not fit; nothing reads a stream.
    """
    norms = [n for n in graph.nodes if kind(n) == "layer_norm"]
    walks: list[_Walk] = []
    seen: set[Any] = set()
    streams, kept = [], []
    refused: list[_Walk] = []
    for node in norms:
        if node in seen:
            continue
        walk = _Walk(graph, node)
        seen |= set(walk.norms)
        walks.append(walk)
    inner = {n for walk in walks for n in walk.sources if not walk.reasons}  # they stay, and so does what they read
    for walk in walks:
        if not walk.reasons and not inner & set(walk.norms):
            streams.append(walk.stream())
        elif walk.reasons and walk.residual:
            refused.append(walk)
        else:
            kept += [where(n) for n in walk.norms if n not in inner]
    if refused:
        walk = next((w for w in refused if w.sources), refused[0])  # a stream of norms' outputs says what the model is
        first = where(walk.norms[0])
        raise RecipeError(
            "A residual stream needs no mean if layers without a nonlinearity after them write it and only LayerNorms "
            f"read it. Of the stream that {first or 'a LayerNorm'} reads: {walk.why()}"
        )
    if not streams:
        raise RecipeError(
            "No residual stream that an nn.LayerNorm reads was found"
            + (f": {', '.join(kept[:5])} read something else." if kept else ": the traced model has no layer norm.")
            + " Models with RMSNorm (Llama, Gemma, T5) have nothing to convert: their norm keeps the mean, and it matters."
            " A layer norm that is written out in a forward pass is not seen; use nn.LayerNorm."
        )
    return streams, kept


class _Walk:
    """One stream, from a norm on in both directions."""

    def __init__(self, graph: Graph, norm: Any):
        self.graph = graph
        self.norms: list[Any] = []
        self.reasons: list[str] = []
        self.sources: list[Any] = []  # layer norms whose output is in the stream
        self.residual = False
        self.writers: dict[tuple[str, int], Writer] = {}
        self.claims: dict[str, set[Any]] = {}
        self.todo: list[Source] = []
        self.seen: set[Source] = set()
        x = arguments(norm)["input"]
        self.width = shape(x)[-1]
        self.add((x, len(shape(x)) - 1))
        while self.todo:
            source = self.todo.pop()
            self.backward(*source)
            self.forward(*source)
        if not self.reasons:
            self.check_uses()

    def add(self, source: Source) -> None:
        if source not in self.seen:
            self.seen.add(source)
            self.todo.append(source)

    def write(self, writer: Writer, used: set[Any]) -> None:
        key = writer.weight, writer.axis
        old = self.writers.get(key)
        if old is not None and (old.bias, old.scale) != (writer.bias, writer.scale):
            self.reasons.append(f"{writer.weight} writes it with two different biases or gains.")
        paths = dict.fromkeys([*(old.modules if old else ()), *writer.modules])
        self.writers[key] = replace(writer, modules=tuple(paths))
        for name in (writer.weight, writer.bias, writer.scale):
            if name:
                self.claims.setdefault(name, set()).update(used)

    def backward(self, node: Any, axis: int) -> None:
        if node in self.graph.tensor:
            self.write(Writer(self.graph.tensor[node], axis, "tensor"), set(node.users))
            return
        if node.op != "call_function":
            self.reasons.append(
                f"{node.name} is an input of the model, or a constant, and no weight that could be changed; convert "
                "the model that makes it."
            )
            return
        if kind(node) == "layer_norm":
            self.sources.append(node)
            return
        try:
            made = written(self.graph, node, axis)
            if made is not None:
                self.write(*made)
                return
            found = sources(node, axis)
        except Foreign as reason:
            self.reasons.append(f"{reason} writes into it, and has no weights that the mean could be taken off.")
            return
        self.residual = self.residual or (kind(node) in ("add", "sub") and len(found) == 2)
        for source in found:
            self.add(source)

    def forward(self, node: Any, axis: int) -> None:
        for user in [u for u in node.users if kind(u) not in NOT_READERS]:
            if user.op == "output":
                self.reasons.append(
                    "it is an output of the model, which would lose its mean; convert a module that holds the model and "
                    "returns its other outputs only."
                )
            elif kind(user) == "layer_norm" and arguments(user)["input"] is node:
                if arguments(user)["normalized_shape"] != [self.width] or axis != len(shape(node)) - 1:
                    self.reasons.append(f"{said(user)} normalises other axes than the features.")
                elif user not in self.norms:
                    self.norms.append(user)
            else:
                for item in user.users if kind(user) in PARTS else [user]:
                    self.follow(item, (node, axis))

    def follow(self, user: Any, source: Source) -> None:
        found = False
        for axis, size in enumerate(shape(user)):
            if size != self.width:
                continue
            try:
                if source in sources(user, axis):
                    self.add((user, axis))
                    found = True
            except Foreign:
                continue
        if not found:
            self.reasons.append(f"{said(user)} {UNNORMALIZED} and would miss the mean.")

    def why(self) -> str:
        """The first reason; before it, what kind of model this is if it is a known one."""
        reader = next((r for r in self.reasons if UNNORMALIZED in r), None)
        if not self.sources or reader is None:
            return self.reasons[0]
        return (
            f"{where(self.sources[0])}, a LayerNorm, writes into it and {reader} That is post-LN: the stream is made of "
            "the norms' outputs and layers read it as it is. Only pre-LN models can be converted."
        )

    def check_uses(self) -> None:
        for key, writer in self.writers.items():
            if self.graph.uses(writer.weight) <= self.claims[writer.weight]:
                if writer.modules:
                    self.writers[key] = replace(writer, modules=())
            elif writer.kind != "embedding" or any(
                kind(u) == "embedding" for u in self.graph.uses(writer.weight) - self.claims[writer.weight]
            ):
                other = next(iter(self.graph.uses(writer.weight) - self.claims[writer.weight]))
                self.reasons.append(
                    f"{writer.weight} writes it and is used by {said(other)} as well; give that its own copy."
                )
            for name in (writer.bias, writer.scale):
                for other in (self.graph.uses(name) - self.claims[name]) if name else ():
                    self.reasons.append(f"{name} is used by {said(other)} as well; give that its own copy.")
        for node in [*self.norms, *self.sources]:
            module = self.graph.model.get_submodule(where(node))
            if type(module) is not nn.LayerNorm:
                self.reasons.append(
                    f"{where(node) or 'the model'} ({type(module).__name__}) calls layer_norm itself; an nn.LayerNorm is "
                    "needed, for it is replaced."
                )
        for node in self.sources:
            path = where(node)
            self.writers[path, 0] = Writer(path, 0, "norm")
            alone = {n for n in self.graph.nodes if kind(n) == "layer_norm" and where(n) == path}
            if not alone <= set(self.sources):
                self.reasons.append(f"{path} writes it in one call and something else in another.")

    def stream(self) -> Stream:
        paths = dict.fromkeys(where(n) for n in self.norms)
        return Stream(self.width, list(self.writers.values()), [self.norm(path) for path in paths])

    def norm(self, path: str) -> Norm:
        readers: dict[str, Reader] = {}
        used: set[Any] = set()
        todo = [(n, len(shape(n)) - 1) for n in self.graph.nodes if kind(n) == "layer_norm" and where(n) == path]
        for node, axis in todo:  # grows
            for user in [u for u in node.users if kind(u) not in NOT_READERS]:
                made = _reads(self.graph, user, node, axis)
                if made is not None:
                    reader = made[0]
                    if readers.setdefault(reader.weight, reader) != reader:
                        return Norm(path, None, f"{reader.weight} is read in two ways")
                    used |= made[1]
                    continue
                moved = [
                    s for item in (user.users if kind(user) in PARTS else [user]) for s in _moved(item, node, axis)
                ]
                if not moved:
                    return Norm(path, None, "its output goes out" if user.op == "output" else f"{said(user)} reads it")
                todo += [s for s in moved if s not in todo]
        for reader in readers.values():
            for name in (reader.weight, reader.bias):
                for other in (self.graph.uses(name) - used) if name else ():
                    return Norm(path, None, f"{name} is used by {said(other)} as well")
        return Norm(path, tuple(readers.values()))


def _reads(graph: Graph, user: Any, node: Any, axis: int) -> tuple[Reader, set[Any]] | None:
    linear = layer(user)
    if linear is None or linear[0] is not node or axis != len(shape(node)) - 1:
        return None
    weight = parameter(graph, linear[1], 1 - linear[2])
    bias = None if linear[3] is None else parameter(graph, linear[3], 0)
    if weight is None or (linear[3] is not None and bias is None):
        return None
    used = {user, weight[2], bias and bias[2]} - {None}
    return Reader(weight[0], weight[1], bias and bias[0]), used


def _moved(user: Any, node: Any, axis: int) -> Iterator[Source]:
    """The user's output, where it has a value's features at other places and nothing else is done to them."""
    if kind(user) not in MOVES:
        return
    for at, size in enumerate(shape(user)):
        try:
            if size == shape(node)[axis] and sources(user, at) == [(node, axis)]:
                yield user, at
        except Foreign:
            continue


def example(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a forward pass: those given, or made up for a transformers model.

    Raises:
        RecipeError: the model needs an example.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, Mapping):
        return (), {str(k): _on(v, device) for k, v in inputs.items()}
    if inputs is not None:
        return tuple(_on(v, device) for v in (inputs if isinstance(inputs, list | tuple) else (inputs,))), {}
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values" and config is not None:
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        dtype = next(p.dtype for p in model.parameters())
        made = torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator).to(dtype)
    elif name == "input_ids" and config is not None and not getattr(config, "is_encoder_decoder", False):
        length = min(13, getattr(config, "max_position_embeddings", None) or 13)
        made = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    else:
        raise RecipeError(
            "The model is traced and checked on example inputs, as its forward pass takes them; give some."
        )
    return (), {name: made.to(device)}


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
