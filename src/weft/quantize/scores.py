"""Which layers of a block only meet one another in a product: the queries and keys whose scores a softmax is taken of.

Small changes of scores are large changes of attention, so methods that clip weights leave these layers alone. They are found
by what they do, not by name: with the first times c and the second divided by c the block gives what it gave, and with
the first at zero it does not. Linear activations would pass as well, so c is large.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from weft.calibrate import Block
from weft.quantize.folding import LEAKS, TOLERANCE, Fold
from weft.quantize.probe import Edit, edited, matrix_of, run_block

LARGE = 64.0  # a power of two is exact; large enough that no activation is nearly linear over it
_Part = tuple[nn.Module, int, int]  # rows of a layer


def score_layers(block: Block, shared: Sequence[Sequence[str]], folds: Sequence[Fold], batch: int = 0) -> set[str]:
    """Layers whose outputs are multiplied by one another's: query and key, of which clips of weights are known to be harmful.

    Two are such a pair if the block gives the same with one multiplied and the other divided by a number; so are two parts
    of a layer that gives values too. Pairs are tried among layers with the same inputs, and, where values have keys beside
    them that none of these matches, with all others.

    Args:
        block: in float32.
        shared: layers that are given the same inputs, by full name.
        folds: of the block.
        batch: the number of the batch to try it on.
    """
    linear, experts = block.linears(), block.experts
    plain = run_block(block, batch).output
    found: set[str] = set()

    def moved(edits: list[Edit]) -> float:
        with edited(edits):
            return float((run_block(block, batch).output - plain).norm())

    def pair(first: _Part, second: _Part) -> bool:
        nothing = moved(_times(first, 0.0))
        return (
            nothing > TOLERANCE * float(plain.norm())
            and moved([*_times(first, LARGE), *_times(second, 1 / LARGE)]) <= 2 * LEAKS * nothing
        )

    for names in shared:
        whole = [(linear[n], 0, len(matrix_of(linear[n]))) for n in names if n in linear]
        for (a, first), (b, second) in itertools.combinations(zip(names, whole), 2):
            if not {a, b} <= found and pair(first, second):
                found |= {a, b}
    for names in shared:  # keys and values of other tokens than the queries': cross-attention
        values = {f.name for f in folds if f.kind == "linear"} & set(names)
        for key in set(names) - values if values and not found & set(names) else ():
            rows = len(matrix_of(linear[key]))
            for query in (n for n in linear if n not in names and len(matrix_of(linear[n])) % rows == 0):
                if {query, key} <= found or query in experts or key in experts:
                    continue
                if pair((linear[query], 0, len(matrix_of(linear[query]))), (linear[key], 0, rows)):
                    found |= {query, key}
    for fold in folds:
        start, size = fold.rows[0], fold.channels
        if fold.kind != "linear" or start <= size:
            continue
        if pair((fold.module, 0, start - size), (fold.module, start - size, start)):  # queries, keys, then values
            found.add(fold.name)
    return found


def _times(part: _Part, factor: float) -> list[Edit]:
    module, start, stop = part
    bias: Any = getattr(module, "bias", None)
    tensors = [matrix_of(module)[start:stop], *([] if bias is None else [bias.detach()[start:stop]])]
    return [(t, t * factor) for t in tensors]
