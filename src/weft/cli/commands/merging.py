"""Combining models: recipes, merges, and units brought into one order first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.cli.arguments import load_plugins, method_options, progress_shown
from weft.cli.options import DryRun, Dtype, Force, Json, Memory, Output, OutputFolder, Plugin, Quiet, ShardSize, Threads
from weft.errors import RecipeError


def run(
    recipe: Annotated[str, typer.Argument(help="weft's recipe or a mergekit file, YAML or JSON.")],
    output: Output,
    dry_run: DryRun = False,
    force: Force = False,
    threads: Threads = None,
    memory: Memory = "",
    as_json: Json = False,
    quiet: Quiet = False,
    plugin: Plugin = None,
) -> None:
    """Carry out a recipe."""
    from weft.cli.execute import execute_recipe

    load_plugins(plugin)
    execute_recipe(
        recipe, output, dry_run=dry_run, force=force, threads=threads, memory=memory, as_json=as_json, quiet=quiet
    )


def merge(
    models: Annotated[list[str], typer.Argument(help="Folders, files, base+adapter, or Hub ids org/name@revision.")],
    output: Output,
    method: Annotated[str, typer.Option("--method", "-m", help="A method's id; `weft methods` lists them.")] = "linear",
    base: Annotated[str, typer.Option("--base", "-b", help="The common start of the models.")] = "",
    weights: Annotated[str, typer.Option("--weights", "-w", help="One number for each model: 0.5,0.3,0.2.")] = "",
    dtype: Dtype = "",
    shard_size: ShardSize = "5GB",
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="base, union, or a model.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Of random methods.")] = 0,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Glob of tensors to merge; others are copied.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Glob of tensors to copy.")] = None,
    missing: Annotated[
        str, typer.Option("--missing", help="A tensor that some models lack: error, skip or copy.")
    ] = "error",
    mismatch: Annotated[str, typer.Option("--mismatch", help="A tensor whose shape differs: error or copy.")] = "error",
    lora_rank: Annotated[
        int | None, typer.Option("--lora-rank", min=1, help="For merging adapters: the largest rank.")
    ] = None,
    score: Annotated[
        str, typer.Option("--score", help="Shell command that prints a score last; {} is the candidate.")
    ] = "",
    allow_non_finite: Annotated[bool, typer.Option("--allow-non-finite", help="Let NaN and infinity through.")] = False,
    dry_run: DryRun = False,
    force: Force = False,
    threads: Threads = None,
    memory: Memory = "",
    as_json: Json = False,
    quiet: Quiet = False,
    plugin: Plugin = None,
) -> None:
    """Merge models. The method's own parameters are options too: --density 0.5 (see `weft methods ties`)."""
    load_plugins(plugin)
    values, names = method_options(models, method, merge)
    if weights:
        values["weights"] = _weights(weights)
    kinds = ("adapter_config.json", "weft_adapter.json")
    if names and all(any((Path(n) / kind).is_file() for kind in kinds) for n in names):
        _merge_adapters(names, output, method, values, base, lora_rank, dtype, dry_run, force, as_json)
        return
    from weft.cli.execute import execute_recipe

    recipe: dict[str, Any] = {
        "steps": [
            {
                "method": method,
                "models": names,
                "parameters": values,
                "missing": missing,
                "mismatch": mismatch,
                **({"base": base} if base else {}),
                **({"include": include} if include else {}),
                **({"exclude": exclude} if exclude else {}),
                **({"score": score} if score else {}),
            }
        ],
        "output": {
            "shard_size": shard_size,
            **({"dtype": dtype} if dtype else {}),
            **({"tokenizer": {"source": tokenizer}} if tokenizer else {}),
        },
        "seed": seed,
        "allow_non_finite": allow_non_finite,
    }
    execute_recipe(
        recipe, output, dry_run=dry_run, force=force, threads=threads, memory=memory, as_json=as_json, quiet=quiet
    )


def align(
    model: Annotated[str, typer.Argument(help="Folder of a transformers model, trained apart from the other.")],
    output: OutputFolder,
    to: Annotated[str, typer.Option("--to", help="The model whose order of units to take.")],
    restarts: Annotated[int, typer.Option("--restarts", min=1, help="Descents; the best is kept.")] = 1,
    max_sweeps: Annotated[int, typer.Option("--max-sweeps", min=1, help="Most sweeps of a descent.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of groups and of further starts.")] = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Permute a model's hidden units and heads to match another's, without changing its function."""
    from weft.cli.align import align_command, align_text

    with progress_shown(quiet) as progress:
        facts = align_command(
            model, to, output, restarts=restarts, max_sweeps=max_sweeps, seed=seed, force=force, progress=progress
        )
    print(json.dumps(facts) if as_json else align_text(facts))


def _merge_adapters(
    names: list[str],
    output: str,
    method: str,
    values: dict[str, Any],
    base: str,
    rank: int | None,
    dtype: str,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Adapters in, one adapter out: their changes are summed exactly, then factored."""
    if method not in ("linear", "task_arithmetic"):
        raise RecipeError(
            f"Adapters by themselves are merged with --method linear or task_arithmetic, not {method}. For other "
            "methods name each with its base: base+adapter."
        )
    if dry_run:
        raise RecipeError("Merging adapters takes a moment and has no dry run; leave --dry-run out.")
    from weft.edit.merge_adapters import merge_adapters
    from weft.method import per_model

    weights = per_model(values.pop("weights", 1.0), len(names))
    if values.pop("normalize", method == "linear"):
        weights = tuple(w / sum(weights) for w in weights)
    if values:
        raise RecipeError(f"Merging adapters has no option --{next(iter(values))}.")
    report = merge_adapters(
        names, output, weights=weights, rank=rank, base=base or None, dtype=dtype or "float32", force=force
    )
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.text())


def _weights(text: str) -> list[float]:
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            raise RecipeError(f"--weights: {part!r} is not a number; write them like 0.5,0.3,0.2.") from None
    return found
