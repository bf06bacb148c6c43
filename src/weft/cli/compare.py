"""``weft compare``: which method and how many bits, for a model and data of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.calibrate import Change
from weft.calibrate.data import SELF, DataOptions
from weft.checkpoint.open import open_checkpoint
from weft.cli.arguments import list_of
from weft.cli.calibrate import read_for
from weft.engine.progress import Progress
from weft.errors import RecipeError, did_you_mean
from weft.function.quantizer import QuantizeMethod
from weft.quantize.compare import compare_methods
from weft.registry import method, methods
from weft.view.evidence import COMPARISON_FILE, comparison_columns, comparison_page, comparison_png
from weft.view.tables import quantity, terminal_width, text_table
from weft.view.write import write_page


def compare_command(
    model: str,
    names: str,
    bits: str,
    data: str,
    output: str,
    options: DataOptions,
    *,
    group_size: int | None,
    held_out: str,
    share: float,
    mixed: str,
    tolerance: float | None,
    budget: int | None,
    sequential: bool,
    keep: bool,
    memory: int,
    plot: str,
    force: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Read the data, compare, and draw; see :func:`weft.quantize.compare.compare_methods`.

    Args:
        names, bits: lists with commas.
        held_out: a file of other data to score on; empty for the last part of the data,
        share: of its rows.
        mixed: bits per weight of mixed candidates, with commas.
        plot: a picture (.png) or a page (.html) beside those of the output.

    Raises:
        RecipeError: a name, a number or the data is wrong.
    """
    if plot and Path(plot).suffix not in (".png", ".html"):
        raise RecipeError(f"--plot writes a .png or an .html, not {plot}.")
    candidates = candidates_of(names.split(","), list_of(float, bits, "--bits", "numbers", "4,3"), group_size)
    targets = list_of(float, mixed, "--mixed", "numbers", "4,3") if mixed else []
    with closing(open_checkpoint(model)) as checkpoint:
        batches = read_for(checkpoint, data, options, [], progress)
        if held_out:
            others = read_for(
                checkpoint, held_out, replace(options, seed=options.seed + (data == held_out == SELF)), [], progress
            )
        else:
            batches, others = split_rows(batches, share)
        found = compare_methods(
            checkpoint, candidates, batches, others, output, mixed=targets, tolerance=tolerance, budget=budget,
            sequential=sequential, keep=keep, memory=memory, force=force, progress=progress,
        )  # fmt: skip
    write_page(Path(output).expanduser() / COMPARISON_FILE, comparison_page(found))
    if plot.endswith(".png"):
        comparison_png(found, plot)
    elif plot:
        write_page(plot, comparison_page(found))
    return found


def candidates_of(names: Sequence[str], bits: Sequence[float], group_size: int | None) -> dict[str, Change]:
    """Configurations of methods by their ids, one for each width where a method has one.

    Raises:
        RecipeError: a name is no quantiser's, or its parameters do not allow such a width.

    >>> list(candidates_of(["rtn", "nf4"], [4, 3], 64))
    ['rtn 4', 'rtn 3', 'nf4']
    """
    made: dict[str, Change] = {}
    for name in names:
        row = method(name.strip())
        if not isinstance(row, QuantizeMethod):
            known = [n for n, r in methods().items() if isinstance(r, QuantizeMethod)]
            raise RecipeError(f"{name.strip()} quantises nothing.{did_you_mean(name.strip(), known)}")
        group = {row.group: group_size} if group_size is not None and row.group in row.parameters else {}
        if "bits" not in row.parameters:
            made[row.name] = row.configure(group)
            continue
        for width in bits:
            if width != int(width):
                raise RecipeError(f"--bits are whole numbers, got {width:g}; for others give --mixed {width:g}.")
            made[f"{row.name} {width:g}"] = row.configure({"bits": int(width), **group})
    return made


def split_rows(
    batches: Sequence[dict[str, Tensor]], share: float
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The first rows of the data, and the last ones, in batches of the sizes that they came in.

    Raises:
        RecipeError: one of the two would be empty.

    >>> import torch
    >>> first, last = split_rows([{"input_ids": torch.arange(6).reshape(3, 2)}], 0.3)
    >>> first[0]["input_ids"].tolist(), last[0]["input_ids"].tolist()
    ([[0, 1], [2, 3]], [[4, 5]])
    """
    rows = sum(len(next(iter(b.values()))) for b in batches)
    count = round(share * rows)
    if not 0 < count < rows:
        raise RecipeError(
            f"Of {rows} rows a share of {share:g} leaves {max(rows - count, 0)} to calibrate on and {count} to score on; both need "
            "some. Give more data, another share, or other data with --held-out."
        )
    first: list[dict[str, Tensor]] = []
    last: list[dict[str, Tensor]] = []
    left = rows - count
    for batch in batches:
        size = len(next(iter(batch.values())))
        here = min(left, size)
        left -= here
        first += [{k: v[:here] for k, v in batch.items()}] if here else []
        last += [{k: v[here:] for k, v in batch.items()}] if here < size else []
    return first, last


def compare_text(found: dict[str, Any]) -> str:
    """The comparison for a person."""
    original = found["original"]
    scores = ", ".join(f"{k} {v:.4g}" for k, v in original["scores"].items() if k in ("perplexity", "accuracy"))
    head = f"original: {quantity(original['bytes'], 'B')}{', ' + scores if scores else ''}"
    return "\n\n".join([head, text_table(comparison_columns(found), found["rows"], terminal_width()), found["verdict"]])
