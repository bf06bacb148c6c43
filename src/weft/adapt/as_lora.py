"""A folder of weft's own as low-rank changes, for readers of files: merging, inspecting and baking know these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.adapt.token_rows import TokenRows
from weft.adapt.weft_folder import Described, describe_weft
from weft.adapt.weights import plan_again
from weft.adapt.whole import Whole
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.dtypes import DTYPES
from weft.checkpoint.header import TensorInfo
from weft.checkpoint.lora_config import LoraConfig
from weft.checkpoint.lora_folder import Adapter, Part
from weft.errors import CheckpointError, RecipeError


def as_lora(adapter: Checkpoint) -> Adapter:
    """Sort the tensors of a folder by what they do to a base; factors are computed when they are read.

    Raises:
        CheckpointError: the folder is damaged, or holds a change that no two factors make.
    """
    where, weights = adapter.name, describe_weft(adapter)
    rows: dict[str, list[int]] = {}
    result = Adapter(LoraConfig(rank=1, alpha=1, token_rows=rows))
    low: dict[str, Described] = {}
    for full, weight in weights.items():
        if len(weight.functions) > 1:
            raise CheckpointError(f"{where}: {full} has {len(weight.functions)} functions, one on the other. {_LIVE}")
        config, tensors, _ = weight.functions[0]
        module, _, leaf = full.rpartition(".")
        if isinstance(config, Whole):
            if weight.layout.get("transposed") or weight.layout.get("groups"):
                raise CheckpointError(f"{where}: {full} is a copy that is stored otherwise than it is seen. {_LIVE}")
            result.whole[full] = _one(tensors, "value", full, where)
        elif isinstance(config, TokenRows) and leaf == "weight" and not weight.layout:
            result.rows[module] = _one(tensors, "values", full, where)
            rows[module] = list(config.rows)
        elif leaf != "weight" or weight.layout.get("batched") or weight.layout.get("groups"):
            raise CheckpointError(f"{where}: {full} is not stored as one matrix. {_LIVE}")
        else:
            low[full] = weight
    seen = {n: torch.empty(w.shape, device="meta") for n, w in low.items()}
    planned = plan_again(nn.Module(), {n: w.functions[0][0] for n, w in low.items()}, seen)
    for full, weight in low.items():
        try:
            function: Any = planned.get(full, weight.functions[0][0]).build(seen[full], batched=False)
        except RecipeError as error:
            raise CheckpointError(f"{where}: {full}: {error} {_LIVE}") from None
        found = _tensors(full, weights, where)
        names = set(function.state_dict())
        if names != found.keys():
            raise CheckpointError(
                f"{where}: {full} needs {', '.join(sorted(names))}, and the folder has {', '.join(sorted(found))}. "
                "Configuration and tensors are from different saves."
            )
        factors = function.to_lora()
        if factors is None:
            kind = type(weight.functions[0][0]).__name__
            raise CheckpointError(f"{where}: what {kind} makes of {full} depends on the base's values. {_LIVE}")
        expand = _expander(function, found)
        if any(found[n].shape != tuple(t.shape) for n, t in function.state_dict().items()):
            raise CheckpointError(f"{where}: tensors of {full} do not fit its configuration and {list(weight.shape)}.")
        module = full.removesuffix(".weight")
        sources = list(found.values())
        A, B = (
            _lazy(f"{module}.{n}", tuple(f.shape), expand, i, sources) for i, (n, f) in enumerate(zip("AB", factors))
        )
        result.parts[module] = Part(
            module, 1.0, A, B, transposed=bool(weight.layout.get("transposed")), tied=weight.tied, layer=weight.layer
        )
    return result


_LIVE = "Load it on the live model (weft.adapt.load_adapter_), and write that with weft.save."


def _one(tensors: Mapping[str, LazyTensor], name: str, full: str, where: str) -> LazyTensor:
    if name not in tensors:
        raise CheckpointError(f"{where}: {full} has no {name}. The save is incomplete.")
    return tensors[name]


def _tensors(full: str, weights: Mapping[str, Described], where: str) -> dict[str, LazyTensor]:
    """All tensors of a weight's function, those that it shares too."""
    _, own, shared = weights[full].functions[0]
    found = dict(own)
    for name, (other, level, theirs) in shared.items():
        held = weights[other].functions if other in weights else []
        if level >= len(held) or theirs not in held[level][1]:
            raise CheckpointError(f"{where}: {full} shares {name} with {other}, which does not have it. It is damaged.")
        found[name] = held[level][1][theirs]
    return found


def _expander(function: nn.Module, found: Mapping[str, LazyTensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    def expand() -> tuple[Tensor, Tensor]:
        filled: Any = copy.deepcopy(function)
        filled.load_state_dict({n: t.torch() for n, t in found.items()}, assign=True)
        with torch.no_grad():
            A, B = filled.to_lora()
        return A.detach().float(), B.detach().float()

    return expand


class _Factor:
    """One of two factors as a source of bytes."""

    def __init__(
        self, name: str, size: int, expand: Callable[[], tuple[Tensor, Tensor]], number: int, stored: list[LazyTensor]
    ):
        self.name, self.size = name, size
        self._expand, self._number, self._stored = expand, number, stored

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        raw = self._expand()[self._number].contiguous().numpy().reshape(-1).view(np.uint8)
        if offset + len(buffer) > raw.size:
            raise CheckpointError(f"{self.name}: read beyond its end.")
        np.frombuffer(buffer, np.uint8)[:] = raw[offset : offset + len(buffer)]

    def close(self) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        for tensor in self._stored:
            tensor.source.close()


def _lazy(
    name: str,
    shape: tuple[int, ...],
    expand: Callable[[], tuple[Tensor, Tensor]],
    number: int,
    stored: list[LazyTensor],
) -> LazyTensor:
    info = TensorInfo(name, DTYPES["F32"], shape, 0, 4 * int(np.prod(shape)))
    return LazyTensor(info, _Factor(name, info.nbytes, expand, number, stored))
