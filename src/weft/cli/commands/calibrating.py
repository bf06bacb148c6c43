"""Commands that run a model over data: statistics, and methods compared."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from weft.cli.arguments import load_plugins, progress_shown
from weft.cli.options import DryRun, Force, HiddenMemory, Json, Length, Model, Output, OutputFolder, Plugin, Quiet

Samples = Annotated[int, typer.Option("--samples", min=1, help="Rows of data, at most.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")]
Pack = Annotated[bool, typer.Option("--pack", help="Texts one after another, cut every --length tokens.")]


def calibrate(
    model: Model,
    data: Annotated[str, typer.Argument(help="A .jsonl or .txt file, or self: what a causal model writes itself.")],
    output: Output,
    statistics: Annotated[
        str,
        typer.Option(
            "--statistics",
            "-s",
            help="Of gram, mean, range, scales, percentiles, routing; with the whole model in memory also gradient, "
            "fisher_exact, fisher_sampled, fisher_empirical.",
        ),
    ] = "gram",
    samples: Samples = 128,
    length: Length = 512,
    batch_size: BatchSize = 8,
    pack: Pack = False,
    assistant_only: Annotated[
        bool, typer.Option("--assistant-only", help="Of conversations, labels of the assistant's tokens only.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn: rows, texts, labels.")] = 0,
    include: Annotated[list[str] | None, typer.Option("--include", help="Glob of layers (default: all).")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of what is kept: float32 or float64.")] = "float32",
    memory: HiddenMemory = "1GB",
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Gather statistics of a model on data, block by block, for quantising, pruning and merging."""
    from weft.calibrate.data import DataOptions
    from weft.cli.calibrate import calibrate_command
    from weft.recipe.size import parse_size

    options = DataOptions(samples, length, batch_size, pack, assistant_only, seed)
    with progress_shown(quiet or dry_run) as progress:
        text = calibrate_command(
            model, data, output, statistics, options, where=include or [], dtype=dtype, memory=parse_size(memory),
            dry_run=dry_run, force=force, as_json=as_json, progress=progress,
        )  # fmt: skip
    print(text)


def compare(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Samples: a .jsonl or .txt file, or self.")],
    output: OutputFolder,
    names: Annotated[
        str, typer.Option("--methods", "-m", help="Quantisers' ids with commas; `weft methods shrink` lists them.")
    ] = "rtn,gptq",
    bits: Annotated[str, typer.Option("--bits", help="Widths to try with each method that has one.")] = "4,3",
    group_size: Annotated[
        int | None, typer.Option("--group-size", min=0, help="Inputs that share a scale (default: the method's).")
    ] = None,
    mixed: Annotated[
        str, typer.Option("--mixed", help="Bits per weight of models with bits chosen layer by layer: 3.5,3.")
    ] = "",
    held_out: Annotated[
        str, typer.Option("--held-out", help="Samples to score on (default: the last part of the data).")
    ] = "",
    share: Annotated[float, typer.Option("--held-out-share", min=0, max=1, help="Of the data, for scores.")] = 0.25,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Loss that is small enough (default: KL 0.05, 1 − cos 0.02)."),
    ] = None,
    budget: Annotated[str, typer.Option("--budget", help="Largest size, such as 4GB; then the best that fits.")] = "",
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential", help="Calibrate each on its own quantised blocks, as weft quantize does (slower)."
        ),
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantised models.")] = False,
    samples: Samples = 128,
    length: Length = 512,
    batch_size: BatchSize = 8,
    pack: Pack = False,
    seed: Annotated[int, typer.Option("--seed", help="Of which rows are taken.")] = 0,
    memory: HiddenMemory = "1GB",
    plot: Annotated[str, typer.Option("--plot", help="The plot as a picture (.png, needs matplotlib) or page.")] = "",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    plugin: Plugin = None,
) -> None:
    """Quantise a model in several ways on the same data, score each, and say which to take."""
    from weft.calibrate.data import DataOptions
    from weft.cli.compare import compare_command, compare_text
    from weft.recipe.size import parse_size

    load_plugins(plugin)
    with progress_shown(quiet) as progress:
        found = compare_command(
            model, names, bits, data, output, DataOptions(samples, length, batch_size, pack, seed=seed),
            group_size=group_size, held_out=held_out, share=share, mixed=mixed, tolerance=tolerance,
            budget=parse_size(budget) if budget else None, sequential=sequential, keep=keep, memory=parse_size(memory),
            plot=plot, force=force, progress=progress,
        )  # fmt: skip
    print(json.dumps(found, indent=1) if as_json else compare_text(found))
    if all(row["failed"] for row in found["rows"]):
        raise typer.Exit(1)
