"""Which tensors belong to which layer, read from names: ``model.layers.12.mlp.up_proj.weight`` is in layer 12."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"^(?P<prefix>.*?)\.?(?P<number>\d+)\.(?P<rest>.+)$")
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


def find_layers(names: Iterable[str], config: dict[str, Any] | None = None) -> LayerMap:
    """The main stack: the numbered prefix whose count the config names, else the one with the most tensors.

    >>> find_layers(["h.0.w", "h.1.w", "h.1.experts.0.w", "wte"])
    LayerMap(prefix='h', count=2)
    """
    numbers: dict[str, set[int]] = {}
    tensors: dict[str, int] = {}
    for name in names:
        found = _LAYER.match(name)
        if found:
            prefix = found["prefix"]
            numbers.setdefault(prefix, set()).add(int(found["number"]))
            tensors[prefix] = tensors.get(prefix, 0) + 1
    complete = {p: len(n) for p, n in numbers.items() if n == set(range(len(n)))}
    if not complete:
        return LayerMap("\0", 0)  # matches no name
    text = (config or {}).get("text_config")
    sizes = [c.get(k) for c in (config or {}, text if isinstance(text, dict) else {}) for k in LAYER_COUNT_KEYS]
    best = max(complete, key=lambda p: (complete[p] in sizes, tensors[p], p))
    return LayerMap(best, complete[best])
