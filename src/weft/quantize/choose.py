"""A configuration for every layer of a model, so that the error is least for a size.

    chosen = choose_bits("model/", {"3": GPTQ(bits=3), "4": GPTQ(bits=4)}, batches, target_bits=3.5)
    quantize_model("model/", "out/", chosen.config, batches, format=chosen.format)

Every candidate is measured in every layer (:func:`weft.quantize.error_curves`), and of all assignments that fit the one with the
least sum of errors is taken (:func:`weft.quantize.frontier`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from weft.calibrate import Change
from weft.checkpoint.checkpoint import Checkpoint
from weft.errors import RecipeError
from weft.quantize.allocate import Allocation, Frontier
from weft.quantize.curves import INPUTS, Curves
from weft.quantize.measure_curves import Candidates, error_curves


class Chosen(NamedTuple):
    """What :func:`choose_bits` found.

    Attributes:
        config: configurations by the names of the layers that have them: what :func:`weft.quantize.quantize_model` takes. A
            method that looks at a whole block sees all its layers there. Those that stay as they are, are not in it.
        allocation: labels by layer, bytes, error.
        curves: what it was found from; for another budget, give them to :func:`choose_bits`.
        frontier: the best for every budget.
        format: of the files whose bytes were counted; give it to :func:`weft.quantize.quantize_model`, which may else take
            another one where the chosen configurations are fewer than the candidates.
    """

    config: dict[tuple[str, ...], Change]
    allocation: Allocation
    curves: Curves
    frontier: Frontier
    format: str


def choose_bits(
    model: nn.Module | Checkpoint | str | Path,
    candidates: Candidates,
    batches: Iterable[Any] | None = None,
    *,
    target_bits: float | None = None,
    target_bytes: float | None = None,
    measure: str = "",
    together: str | Iterable[Sequence[str]] = INPUTS,
    curves: Curves | None = None,
    **options: Any,
) -> Chosen:
    """A configuration for every layer of a model, so that the total error is least for a size.

    Args:
        model: a folder, Hub id, open checkpoint, or module with a list of blocks.
        candidates: configurations by label; None leaves a layer in its own type.
        batches: calibration data.
        target_bits: bits per weight of the chosen layers together, scales included; or
        target_bytes: their bytes in files.
        measure: one of ``MEASURES``; empty: ``block`` where there are batches (or curves that have it), else ``relative``.
        together: see :meth:`Curves.frontier`.
        curves: measured before, instead of now.
        options: of :func:`error_curves`.

    Raises:
        RecipeError: no target or two, no choice fits into it, or as of :func:`error_curves`.

    >>> import torch
    >>> from weft.quantize import RTN
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    >>> candidates = {str(bits): RTN(bits=bits, group_size=0) for bits in (2, 4, 8)}
    >>> found = choose_bits(model, candidates, [torch.randn(16, 64)], target_bits=6, blocks="1")
    >>> sorted(sum(found.config, ())), found.allocation.bits_per_weight <= 6
    (['1.0', '1.1'], True)
    """
    if (target_bits is None) == (target_bytes is None):
        raise RecipeError("Give target_bits (bits per weight) or target_bytes, one of them.")
    if curves is None:
        block_errors = options.pop("block_errors", measure == "block" or (not measure and batches is not None))
        curves = error_curves(model, candidates, batches, block_errors=block_errors, **options)
    size = sum(curves.sizes.values())
    budget = target_bytes if target_bytes is not None else size * (target_bits or 0) / 8
    front = curves.frontier(measure, together=together)
    found = front.best(budget)
    unknown = set(found.choices.values()) - set(candidates)
    if unknown:
        raise RecipeError(f"The curves are of other candidates: {', '.join(sorted(unknown))} is not among those given.")
    names: dict[str, list[str]] = {}
    for name, label in found.choices.items():
        names.setdefault(label, []).append(name)
    made = {
        tuple(names[label]): change for label, change in candidates.items() if label in names and change is not None
    }
    return Chosen(made, found, curves, front, curves.format)
