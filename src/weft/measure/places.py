"""Where a tensor stands in a network, read from its name: which stack of layers, which layer, which kind of module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_SEPARATOR = re.compile(r"[./]")
_LAYER = re.compile(r"(?:(?:layer|block)s?_)?(\d+)")
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Position of a tensor.

    Attributes:
        stack: what comes before the layer's number, ``"model.layers"``; empty outside the layers.
        layer: the first number in the name, None outside the layers.
        kind: the end of what comes after it, as short as tells the kinds of one model apart: ``"q_proj"``.
    """

    stack: str
    layer: int | None
    kind: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of each name among all ``names`` of a model.

    Numbers after the first (experts, blocks within a stage) are left out of the kind, so that a kind covers them all.

    >>> found = places(["wte.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight", "h.0.ln_1.bias"])
    >>> for place in found.values():
    ...     print(place)
    Place(stack='', layer=None, kind='wte')
    Place(stack='h', layer=0, kind='attn.c_proj')
    Place(stack='h', layer=0, kind='mlp.c_proj')
    Place(stack='h', layer=0, kind='ln_1.bias')
    """
    split = {name: _split(name) for name in names}
    kinds = {kind for _, _, kind in split.values()}
    endings = Counter(kind[-length:] for kind in kinds for length in range(1, len(kind) + 1))
    return {name: Place(stack, layer, _short(kind, endings)) for name, (stack, layer, kind) in split.items()}


def group(items: Iterable[T], label: Callable[[T], str]) -> dict[str, list[T]]:
    """Items under each label, labels in order of first appearance."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(label(item), []).append(item)
    return groups


def layer_label(place: Place, stacks: Sequence[str]) -> str:
    """What a table calls the layer: its number, with its stack where a model has several.

    >>> layer_label(Place("decoder", 3, "q"), ["encoder", "decoder"]), layer_label(Place("h", 3, "q"), ["h"])
    ('decoder.3', '3')
    """
    if place.layer is None:
        return "outside the layers"
    return f"{place.stack}.{place.layer}".lstrip(".") if len(stacks) > 1 else str(place.layer)


def stacks_of(found: Iterable[Place]) -> list[str]:
    """The different stacks, in order of first appearance."""
    return list(dict.fromkeys(place.stack for place in found if place.layer is not None))


def _split(name: str) -> tuple[str, int | None, tuple[str, ...]]:
    """Stack, layer and the parts of the kind."""
    parts = _SEPARATOR.split(name)
    stack, layer = "", None
    for position, part in enumerate(parts):
        match = _LAYER.fullmatch(part)
        if match and part.isascii():
            stack, layer, parts = ".".join(parts[:position]), int(match[1]), parts[position + 1 :]
            break
    kind = tuple(part for part in parts if not part.isdigit())
    if len(kind) > 1 and kind[-1] == "weight":
        kind = kind[:-1]
    return stack, layer, kind or ("weight",)


def _short(kind: tuple[str, ...], endings: Counter[tuple[str, ...]]) -> str:
    """The shortest ending that no other kind has; a parameter that is not a weight keeps its module's name."""
    least = 2 if kind[-1] in ("bias", "lora_A", "lora_B", "scales", "zeros", "qweight", "qzeros") else 1
    for length in range(min(least, len(kind)), len(kind) + 1):
        if endings[kind[-length:]] == 1:
            return ".".join(kind[-length:])
    return ".".join(kind)
