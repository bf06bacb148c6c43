"""weft's own format, which holds every form: tensors ``P.weft.<name>``, facts in the quantization_config.

    {"quant_method": "weft", "layers": {P: {"shape": [out, in], "form": …, …}}, "ignore": […]}

Names and facts are those of :meth:`weft.packed.form.Packed.tensors` and :meth:`~weft.packed.form.Packed.settings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.errors import CheckpointError
from weft.packed.form import Packed, unpack
from weft.packed.formats.format import DAMAGED, Format, Get, Shapes, required

_MARK = ".weft."


class Own(Format):
    """Every form, as it is."""

    name: ClassVar[str] = "weft"
    method: ClassVar[str] = "weft"

    def refuses(self, packed: Packed) -> str:
        return ""

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        return {f"weft.{name}": tensor for name, tensor in packed.tensors().items()}

    def config(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, Any]:
        facts = {n: {"shape": list(p.shape), "tensors": sorted(p.tensors()), **p.settings()} for n, p in layers.items()}
        return {"quant_method": "weft", "layers": facts, "ignore": list(ignored)}

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
        made: dict[str, list[str]] = {}
        for name in names:
            layer, mark, _ = name.rpartition(_MARK)
            if mark:
                made.setdefault(layer, []).append(name)
        return made

    def shape(self, name: str, shapes: Shapes, get: Get, config: Mapping[str, Any]) -> tuple[int, ...]:
        facts = _facts(name, config)
        shape = facts.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(s) is int and s > 0 for s in shape):
            raise CheckpointError(
                f"{name}: the quantization_config says the shape {shape!r}, which is no matrix. {DAMAGED}"
            )
        missing = [part for part in _tensors(name, facts) if f"{name}{_MARK}{part}" not in shapes]
        if missing:
            raise CheckpointError(
                f"{name}{_MARK}{missing[0]} is missing, and the layer cannot be read without it. {DAMAGED}"
            )
        return shape[0], shape[1]

    def read(self, name: str, get: Get, config: Mapping[str, Any]) -> Packed:
        facts = _facts(name, config)
        tensors = {part: required(get, f"{name}{_MARK}{part}") for part in _tensors(name, facts)}
        try:
            packed = unpack(tensors, facts)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        if list(packed.shape) != facts.get("shape"):
            raise CheckpointError(f"{name} is {list(packed.shape)}, and should be {facts.get('shape')}. {DAMAGED}")
        return packed


def _facts(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    layers = config.get("layers")
    facts = layers.get(name) if isinstance(layers, Mapping) else None
    if not isinstance(facts, Mapping):
        raise CheckpointError(
            f"{name} is packed, and the quantization_config does not have it among its layers. {DAMAGED}"
        )
    return facts


def _tensors(name: str, facts: Mapping[str, Any]) -> list[str]:
    parts = facts.get("tensors")
    if not isinstance(parts, list) or not parts or not all(isinstance(p, str) for p in parts):
        raise CheckpointError(f"{name}: the quantization_config does not name its tensors. {DAMAGED}")
    return parts
