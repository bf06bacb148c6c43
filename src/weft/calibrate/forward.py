"""Forward passes of a walk: batches, blocks' arguments, and functions that stand in for blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from weft.calibrate.activations import nested_map
from weft.errors import RecipeError

Batch = Any  # a tensor, a tuple of positional arguments, or a mapping of named ones


def digest_of(value: Any) -> str:
    """A digest of a nest of tensors and plain values: of their bytes, shapes and types, and of the names in mappings.

    >>> digest_of([torch.zeros(2, 3)]) == digest_of([torch.zeros(3, 2)])
    False
    """
    digest = xxhash.xxh3_128()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            digest.update(f"mapping of {len(part)}".encode())
            for key, inner in part.items():
                digest.update(repr(key).encode())
                add(inner)
        elif isinstance(part, list | tuple):
            digest.update(f"sequence of {len(part)}".encode())
            for inner in part:
                add(inner)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


class StandIns:
    """For the length of a ``with``: other forward functions for some modules."""

    def __init__(self, model: nn.Module, forwards: Mapping[str, Callable[..., Any]]):
        self._modules = {name: model.get_submodule(name) for name in forwards}
        self._forwards = forwards
        self._before: dict[str, Any] = {}  # forward functions that others have put on single modules

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            if "forward" in module.__dict__:
                self._before[name] = module.__dict__["forward"]
            module.__dict__["forward"] = self._forwards[name]

    def __exit__(self, *exc: object) -> None:
        for name, module in self._modules.items():
            module.__dict__.pop("forward", None)
            if name in self._before:
                module.__dict__["forward"] = self._before[name]


def without_cache(model: nn.Module) -> list[Any]:
    """Configurations whose cache was on and is off now: a block would see its own keys again in its second run."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    found = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in found:
        config.use_cache = False
    return found


def call(model: nn.Module, batch: Batch) -> Any:
    """A model's outputs for a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def hidden_of(out: Any, name: str) -> Tensor:
    """The hidden states among what a block returns.

    Raises:
        RecipeError: there are none.
    """
    hidden = out[0] if isinstance(out, tuple) else out
    if not isinstance(hidden, Tensor):
        raise RecipeError(f"{name} returns {type(hidden).__name__} and not hidden states; it cannot be walked.")
    return hidden


@functools.cache
def has_bfloat16() -> bool:
    """Whether this processor has instructions that multiply in bfloat16."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def on_cpu(batch: Batch) -> Batch:
    """A batch whose tensors need no gradients and are on the CPU."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return nested_map(batch, lambda tensor: tensor.detach().cpu())
