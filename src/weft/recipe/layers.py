"""Which tensors belong to which layer, read from names: ``model.layers.12.mlp.up_proj.weight`` is in layer 12."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"^(?:(?P<prefix>.*?)\.)?(?P<number>\d+)\.(?P<rest>.+)$")
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class LayerMap:
    """The main stack of layers of a model: names of its tensors are ``prefix.<number>.rest``."""

    prefix: str
    count: int

    def split(self, name: str) -> tuple[int, str] | None:
        """Layer number and the rest of the name; None for tensors outside the stack.

        >>> LayerMap("model.layers", 2).split("model.layers.1.mlp.weight")
        (1, 'mlp.weight')
        """
        head = f"{self.prefix}." if self.prefix else ""
        if not name.startswith(head):
            return None
        number, _, rest = name[len(head) :].partition(".")
        return (int(number), rest) if number.isascii() and number.isdigit() and rest else None

    def name(self, number: int, rest: str) -> str:
        """The name of a tensor in layer ``number``."""
        return f"{self.prefix}.{number}.{rest}" if self.prefix else f"{number}.{rest}"

    def depth(self, name: str) -> float:
        """0 for the first layer, 1 for the last, 0 for tensors outside the stack."""
        found = self.split(name)
        if found is None:
            return 0.0
        return found[0] / (self.count - 1) if self.count > 1 else 1.0


def find_stacks(names: Iterable[str]) -> dict[LayerMap, int]:
    """All stacks of layers that are not inside another one, and how many tensors each has.

    >>> find_stacks(["h.0.w", "h.1.w", "h.1.experts.0.w", "wte", "visual.0.w"])
    {LayerMap(prefix='h', count=2): 3, LayerMap(prefix='visual', count=1): 1}
    """
    numbers: dict[str, list[int]] = {}
    for name in names:
        found = _LAYER.match(name)
        if found:
            numbers.setdefault(found["prefix"] or "", []).append(int(found["number"]))
    counts = {prefix: len(set(found)) for prefix, found in numbers.items()}
    return {LayerMap(p, counts[p]): len(n) for p, n in numbers.items() if max(n) == counts[p] - 1}


def find_layers(names: Iterable[str], config: dict[str, Any] | None = None) -> LayerMap:
    """The main stack: the one whose count the config names, else the one with the most tensors.

    >>> find_layers(["h.0.w", "h.1.w", "h.1.experts.0.w", "wte"])
    LayerMap(prefix='h', count=2)
    """
    stacks = find_stacks(names)
    if not stacks:
        return LayerMap("\0", 0)  # matches no name
    text = (config or {}).get("text_config")
    sizes = [c.get(k) for c in (config or {}, text if isinstance(text, dict) else {}) for k in LAYER_COUNT_KEYS]
    return max(stacks, key=lambda s: (s.count in sizes, stacks[s], s.prefix))


def depth_of(name: str, stacks: Iterable[LayerMap]) -> float:
    """0 for the first layer of its stack, 1 for the last, 0 for tensors outside all of them."""
    return next((s.depth(name) for s in stacks if s.split(name)), 0.0)
