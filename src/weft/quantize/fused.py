"""Layers that serving programs make one of: their scales have to be alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

FUSED = (  # layers that vLLM makes one of, by the ends of their names
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)


def fused_layers(names: Iterable[str]) -> list[list[str]]:
    """Those of the layers that become one, together.

    >>> fused_layers(["a.q_proj", "a.k_proj", "b.q_proj", "a.o_proj"])
    [['a.q_proj', 'a.k_proj'], ['b.q_proj']]
    """
    found: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for name in names:
        prefix, _, leaf = name.rpartition(".")
        for parts in FUSED:
            if leaf in parts:
                found[prefix, parts].append(name)
    return list(found.values())
