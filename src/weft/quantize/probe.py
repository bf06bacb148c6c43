"""A block of a model as an experiment: run it in float32 with some of its weights changed, and look at what comes of it.

    with in_float32(block):
        run = run_block(block, 0)                       # its output, and rows of what its layers are given
        with edited([(layer.weight, 2 * layer.weight)]):
            other = run_block(block, 0)                 # and again; behind the ``with`` the weight is as before

:class:`Around` is the smallest module around some layers, with what it is called with: scales, clips and groups of a layer
are chosen by what that module returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate import Block
from weft.calibrate.activations import nested_map
from weft.calibrate.experts import Slice
from weft.calibrate.forward import hidden_of
from weft.calibrate.watch_block import mask_in
from weft.errors import RecipeError
from weft.function.layout import layout_of

ROWS = 64  # of each layer's inputs that a run keeps
Edit = tuple[Tensor, Tensor]  # a tensor and its new values


def matrix_of(module: Any) -> Tensor:
    """A layer's matrix (out, in), over its own memory."""
    weight: Tensor = module.weight.detach()
    return layout_of(module, "weight", weight).seen(weight)


@contextmanager
def in_float32(block: Block) -> Iterator[dict[int, torch.dtype]]:
    """A block's parameters in float32; behind the ``with`` they are rounded to their own types again.

    Yields:
        The types that they had, by the parameters' identities.
    """
    kept = {id(p): p.dtype for p in block.module.parameters() if p.is_floating_point()}
    narrow = [p for p in block.module.parameters() if kept.get(id(p), torch.float32) != torch.float32]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        _renew(block)
        yield kept
    finally:
        for parameter in narrow:
            parameter.data = parameter.data.to(kept[id(parameter)])
        _renew(block)


def dtype_of(module: Any, kept: dict[int, torch.dtype]) -> torch.dtype:
    """The type that a module's weight had (:func:`in_float32`)."""
    parameter = getattr(module.experts, module.part) if isinstance(module, Slice) else module.weight
    return kept.get(id(parameter), torch.float32)


def _renew(block: Block) -> None:
    """Single experts are views of parameters whose memory has moved."""
    for layer in block.experts.values():
        fused = getattr(layer.experts, layer.part).detach()[layer.index]
        layer.weight.data = fused.mT if layer.experts.is_transposed else fused
        bias = getattr(layer.experts, f"{layer.part}_bias", None)
        if layer.bias is not None and bias is not None:
            layer.bias.data = bias.detach()[layer.index]


@contextmanager
def edited(edits: Iterable[Edit]) -> Iterator[None]:
    """Tensors with other values for the length of a ``with``, and exactly as before behind it."""
    edits = list(edits)
    before = [tensor.clone() for tensor, _ in edits]
    try:
        write(edits)
        yield
    finally:
        write((tensor, old) for (tensor, _), old in zip(edits, before))


@torch.no_grad()
def write(edits: Iterable[Edit]) -> None:
    """Give tensors new values, in place."""
    for tensor, new in edits:
        tensor.copy_(new)


def arguments(block: Block, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is called with for a batch, floating-point numbers in float32."""
    args, kwargs = block.batch(number)
    return nested_map(args, _float), nested_map(kwargs, _float)


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@dataclass
class Run:
    """What came of running a block.

    Attributes:
        output: its hidden states.
        inputs: up to 64 rows of what each layer was given, spread evenly; layers that did not run are missing.
    """

    output: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def run_block(block: Block, number: int, layers: dict[str, nn.Module] | None = None) -> Run:
    """Run a block (in float32) over a batch.

    Args:
        block: the block.
        number: of the batch.
        layers: whose inputs to keep, by name.
    """
    found: dict[str, list[Tensor]] = {}

    def seeing(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            rows = x.reshape(-1, x.shape[-1])
            if len(rows):
                found.setdefault(name, []).append(rows[_spread(len(rows), ROWS)].clone())

        return hook

    handles = [m.register_forward_pre_hook(seeing(n), with_kwargs=True) for n, m in (layers or {}).items()]
    try:
        args, kwargs = arguments(block, number)
        output = hidden_of(block.module(*args, **kwargs), block.name)
    finally:
        for handle in handles:
            handle.remove()
    return Run(output.clone(), {n: torch.cat(parts) for n, parts in found.items()})


def _spread(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most)).round().long()


class Around:
    """The smallest module that contains layers and is none of them, with what it is called with and what it returns.

    Args:
        block: in float32, with the weights that give the reference.
        names: full names of the layers.
        tokens: of the calibration data to look at; whole batches, spread evenly over all, and at least one.

    Attributes:
        name: full name of the module; the block's own where nothing smaller contains the layers.
    """

    def __init__(self, block: Block, names: Sequence[str], tokens: int):
        self.block = block
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor | None]] = []
        called: set[str] = set()
        modules = {".".join(p for p in (block.name, path) if p): m for path, m in block.module.named_modules()}
        around = [n for n in modules if n not in names and all(f"{name}.".startswith(f"{n}.") for name in names)]
        handles = [modules[n].register_forward_pre_hook(lambda m, a, n=n: called.add(n)) for n in around]
        try:
            run_block(block, 0)
        finally:
            for handle in handles:
                handle.remove()
        self.name = max((n for n in around if n in called), key=len)
        self._module = modules[self.name]
        self._record(tokens)

    def _record(self, tokens: int) -> None:
        mask = mask_in(self.block)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            result = _first(output).clone()
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), result)
            keep = mask(given)
            fits = keep is not None and keep.shape == result.shape[: keep.dim()]
            held = nested_map(args, _held), nested_map(kwargs, _held)
            self._calls.append((*held, result, keep.bool() if fits and keep is not None else None))

        handle = self._module.register_forward_hook(hook, with_kwargs=True)
        try:
            for number in _batches(self.block, tokens):
                run_block(self.block, number)
        finally:
            handle.remove()

    @torch.no_grad()
    def loss(self) -> float:
        """The mean square of how far the module's outputs now are from the reference; padding is left out."""
        total, count = 0.0, 0
        for args, kwargs, reference, keep in self._calls:
            delta = _first(self._module(*nested_map(args, _held), **nested_map(kwargs, _held))) - reference
            if keep is not None:
                delta = delta[keep]
            total += float(delta.double().square().sum())
            count += delta.numel()
        return total / max(count, 1)


def _held(tensor: Tensor) -> Tensor:
    """Hidden states may be changed in place by who is given them; masks are large, and are not."""
    return tensor.clone() if tensor.dim() <= 3 else tensor


def _first(output: Any) -> Tensor:
    """The hidden states of what a module returns."""
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise RecipeError(f"A module returns {type(found).__name__}, of which no error can be measured.")
    return found


def _batches(block: Block, tokens: int) -> list[int]:
    """Numbers of batches, spread evenly, that hold about so many tokens."""
    count = len(block.walk.batches)
    args, kwargs = block.batch(0)
    hidden = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    rows = max(hidden.numel() // hidden.shape[-1], 1)
    return sorted(set(_spread(count, max(1, tokens // rows)).tolist()))
