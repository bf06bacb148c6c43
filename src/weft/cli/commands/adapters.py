"""Adapters: attached to a model, added to its weights, and taken from the difference of two."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.arguments import list_of, load_plugins, method_options, progress_shown
from weft.cli.options import Force, Json, Memory, Output, Plugin, Quiet, Samples, ShardSize, Threads
from weft.errors import RecipeError


def adapt(
    model: Annotated[list[str], typer.Argument(help="A folder or Hub id of a transformers model.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to make; without it, only count.")] = "",
    method: Annotated[
        str, typer.Option("--method", "-m", help="An adapter's id; `weft methods adapt` lists them.")
    ] = "lora",
    where: Annotated[
        list[str] | None, typer.Option("--where", help="Layers: a glob, a suffix, re:…, or all-linear (default).")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option("--ignore", help="Layers to leave alone.")] = None,
    modules_to_save: Annotated[
        list[str] | None, typer.Option("--modules-to-save", help="Modules to train whole.")
    ] = None,
    token_rows: Annotated[str, typer.Option("--token-rows", help="Rows of the embedding to train: 32000,32001.")] = "",
    recipe: Annotated[str, typer.Option("--recipe", help="YAML with several methods, instead of --method.")] = "",
    data: Annotated[
        str, typer.Option("--data", help="Samples (.jsonl, .txt or self), for methods that start from data.")
    ] = "",
    samples: Samples = 128,
    name: Annotated[str, typer.Option("--name", help="Of the adapter.")] = "default",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Of the forecast, and of the data.")] = 8,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens a row, likewise.")] = 512,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    plugin: Plugin = None,
) -> None:
    """Attach an adapter to a model: what trains, what memory that takes, and a folder to train from.

    The method's own parameters are options too: --rank 16 (see `weft methods lora`).
    """
    from weft.cli.adapt import AdaptPlan, adapt_command, adapt_text, read_plan

    load_plugins(plugin)
    values, names = method_options(model, method, adapt)
    if len(names) != 1:
        raise RecipeError(f"weft adapt takes one model, got {names}.")
    if recipe:
        if values or where or modules_to_save or token_rows or ignore:
            raise RecipeError("--recipe says where and what; leave --where and the method's options to it.")
        plan = read_plan(recipe)
    else:
        plan = AdaptPlan(
            [(w, method, values) for w in where or ["all-linear"]], modules_to_save or [], [], ignore or []
        )
        if token_rows:
            plan.token_rows = list_of(int, token_rows, "--token-rows", "token ids", "32000,32001")
    with progress_shown(quiet) as progress:
        facts = adapt_command(
            names[0], plan, output or None, data=data, name=name, samples=samples, batch=batch_size, length=length,
            force=force, progress=progress,
        )  # fmt: skip
    print(json.dumps(facts, indent=1) if as_json else adapt_text(facts))


def bake(
    base: Annotated[str, typer.Argument(help="The model that the adapters were trained on: folder, file, Hub id.")],
    adapter: Annotated[
        list[str], typer.Option("--adapter", "-a", help="Folder of PEFT or weft; a/=0.5 halves its change. Repeat it.")
    ],
    output: Output,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16 (default: as the base).")] = "",
    shard_size: ShardSize = "5GB",
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Compare with the live adapters before publishing.")
    ] = True,
    data: Annotated[str, typer.Option("--data", help='Texts for the probe, JSON lines with a "text" each.')] = "",
    seed: Annotated[int, typer.Option("--seed", help="Of the probe's random tokens and vectors.")] = 0,
    max_change: Annotated[
        float | None,
        typer.Option("--max-change", min=0, help="Fail if an output changes by more, as a share of the largest."),
    ] = None,
    check_base: Annotated[
        bool, typer.Option("--check-base/--no-check-base", help="Refuse a base that an adapter was not trained on.")
    ] = True,
    force: Force = False,
    threads: Threads = None,
    memory: Memory = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add adapters to their base and write one plain model: in float32, rounded once, checked by a probe."""
    from weft.cli.execute import run_options
    from weft.cli.show import result_text
    from weft.recipe.bake import bake as run_bake
    from weft.recipe.bake import probe_text

    options = run_options(force, threads, memory)
    with progress_shown(quiet) as progress:
        options.progress = progress
        done = run_bake(
            base, [_weighted(a) for a in adapter], output, dtype=dtype, shard_size=shard_size, check_base=check_base,
            probe=probe, data=data, seed=seed, max_change=float("inf") if max_change is None else max_change,
            options=options,
        )  # fmt: skip
    if as_json:
        print(json.dumps(done.to_dict()))
        return
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    for name, known in done.base.items():
        print(f"{name}: base {known}")
    print(probe_text(done.probe))
    print(result_text(done.to_dict()))


def extract(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    output: Output,
    base: Annotated[str, typer.Option("--base", "-b", help="The model it was tuned from.")],
    lora_rank: Annotated[int, typer.Option("--lora-rank", "-r", min=1, help="Rank of the adapter.")] = 32,
    alpha: Annotated[float | None, typer.Option("--alpha", help="LoRA alpha (default: the rank).")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Smallest rank that keeps this share of each change.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option("--include", help="Glob of tensors.")] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Glob of tensors to leave out.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn the difference of two models into a LoRA adapter that PEFT loads."""
    from weft.edit.extract_lora import extract_lora

    with progress_shown(quiet) as progress:
        report = extract_lora(
            tuned, base, output, rank=lora_rank, alpha=alpha, min_energy=energy, include=tuple(include or ()),
            exclude=tuple(exclude or ()), force=force, progress=progress,
        )  # fmt: skip
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.text())


def _weighted(adapter: str) -> tuple[str, float]:
    """``folder=0.5`` as the folder and its weight."""
    folder, equals, text = adapter.rpartition("=")
    if not equals or Path(adapter).exists():
        return adapter, 1.0
    try:
        return folder, float(text)
    except ValueError:
        raise RecipeError(
            f"--adapter {adapter}: {text!r} is not a number; write the weight like adapter/=0.5."
        ) from None
