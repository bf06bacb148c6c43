"""``weft``: one command for each thing that is done to weights.

Help answers at once because nothing but the standard library and typer is imported before a command runs.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.cli import quantizing
from weft.errors import RecipeError, WeftError, did_you_mean

app = typer.Typer(
    name="weft",
    help="Merge, inspect and convert neural-network weights. A weight is a function: W = f(θ).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[str, typer.Option("--output", "-o", help="Folder to make, or one file if it ends in .safetensors.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that weft made; discard an unfinished run.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything from headers and print the plan; write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-j", min=1, help="Worker threads (default: cores, at most 8).")
]
Memory = Annotated[
    str, typer.Option("--memory", help="Memory budget such as 2GB (default: 512MB or a quarter of RAM).")
]
Plugin = Annotated[list[str] | None, typer.Option("--plugin", help="Python file with METHODS of your own; it is run.")]
Plot = Annotated[str, typer.Option("--plot", help="Write an HTML page with plots.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16 (default: as the inputs).")]
Limit = Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Rows to show.")]

# options that are parameters of the chosen method arrive among the models, in order
_METHOD_OPTIONS = {"ignore_unknown_options": True}


def main() -> None:
    """Entry point: errors that weft raises on purpose are printed, not traced."""
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    try:
        code = app(standalone_mode=False)  # typer returns the code of an Exit, and makes one of an interruption
        if code == 130:
            raise KeyboardInterrupt
        if isinstance(code, int) and code:
            sys.exit(code)
    except WeftError as error:
        _fail(error)
    except (typer.Abort, KeyboardInterrupt):
        print("\nstopped; the same command continues where it was", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # a usage error of the option parser
            error.show()
            sys.exit(error.exit_code)
        raise


def _fail(error: WeftError) -> None:
    message = as_typed(str(error))
    if "--json" in sys.argv:
        print(json.dumps({"error": type(error).__name__, "message": message}))
    print(f"error: {message}", file=sys.stderr)
    sys.exit(error.exit_code)


def as_typed(message: str) -> str:
    """A message that names arguments of Python's functions, with the options that one types instead.

    >>> as_typed('replace it with force=True, or choose missing="skip"')
    'replace it with --force, or choose --missing skip'
    """
    message = message.replace("check_base=False", "--no-check-base").replace("max_change", "--max-change")
    message = re.sub(r'\b(missing|mismatch)="(\w+)"', r"--\1 \2", message).replace("base=…", "--base")
    message = message.replace("skip_errors=True", "--on-error skip")
    return re.sub(r"\b(force|allow_non_finite)=True", lambda found: "--" + found[1].replace("_", "-"), message)


@app.command(epilog="Example: weft run recipe.yaml -o merged/ --dry-run")
def run(
    recipe: Annotated[str, typer.Argument(help="weft's recipe or a mergekit file, YAML or JSON.")],
    output: Out,
    dry_run: DryRun = False,
    force: Force = False,
    threads: Threads = None,
    memory: Memory = "",
    as_json: Json = False,
    quiet: Quiet = False,
    plugin: Plugin = None,
) -> None:
    """Carry out a recipe."""
    _load_plugins(plugin)
    _execute(recipe, output, dry_run, force, threads, memory, as_json, quiet)


@app.command(
    context_settings=_METHOD_OPTIONS,
    epilog="Example: weft merge ft0/ ft1/ --base base/ --method ties --density 0.5 -o merged/",
)
def merge(
    models: Annotated[list[str], typer.Argument(help="Folders, files, base+adapter, or Hub ids org/name@revision.")],
    output: Out,
    method: Annotated[str, typer.Option("--method", "-m", help="A method's id; `weft methods` lists them.")] = "linear",
    base: Annotated[str, typer.Option("--base", "-b", help="The common start of the models.")] = "",
    weights: Annotated[str, typer.Option("--weights", "-w", help="One number for each model: 0.5,0.3,0.2.")] = "",
    dtype: Dtype = "",
    shard_size: Annotated[str, typer.Option("--shard-size", help="Largest output file.")] = "5GB",
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
    _load_plugins(plugin)
    values, names = _method_options(models, method, merge)
    if weights:
        values["weights"] = [float(w) for w in _numbers(weights)]
    kinds = ("adapter_config.json", "weft_adapter.json")
    if names and all(any((Path(n) / kind).is_file() for kind in kinds) for n in names):
        _merge_adapters(names, output, method, values, base, lora_rank, dtype, dry_run, force, as_json)
        return
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
    _execute(recipe, output, dry_run, force, threads, memory, as_json, quiet)


@app.command(epilog="Example: weft align other/ --to model/ -o aligned/")
def align(
    model: Annotated[str, typer.Argument(help="Folder of a transformers model, trained apart from the other.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to make.")],
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
    from weft.engine.progress import default_progress

    with _progress(default_progress(quiet)) as progress:
        facts = align_command(
            model, to, output, restarts=restarts, max_sweeps=max_sweeps, seed=seed, force=force, progress=progress
        )
    print(json.dumps(facts) if as_json else align_text(facts))


@app.command(
    epilog="Example: weft convert pytorch_model.bin -o model.safetensors, or weft convert model/ -o model.gguf -t q4_0"
)
def convert(
    model: Annotated[str, typer.Argument(help="What to read: .bin, .pt, .gguf, folder, base+adapter, Hub id.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to make, or one file that ends in .safetensors or .gguf.")
    ],
    dtype: Dtype = "",
    shard_size: Annotated[str, typer.Option("--shard-size", help="Largest output file.")] = "5GB",
    kind: Annotated[
        str, typer.Option("--type", "-t", help="GGUF: type of matrices, f32, f16, bf16, q8_0 or q4_0 (default: q8_0).")
    ] = "",
    embeddings: Annotated[
        str, typer.Option("--embeddings", help="GGUF: type of embedding and output head (default: q8_0 beside q4_0).")
    ] = "",
    imatrix: Annotated[
        str, typer.Option("--imatrix", help="GGUF: importance matrix, or folder of statistics, for the scales of q4_0.")
    ] = "",
    pre_tokenizer: Annotated[
        str, typer.Option("--pre-tokenizer", help="GGUF: llama.cpp's name of how the tokenizer cuts text.")
    ] = "",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model as safetensors or GGUF, without running anything that its files contain."""
    from weft.cli.convert import gguf_command, gguf_text, note_of

    if output.endswith(".gguf"):
        from weft.engine.progress import default_progress

        if dtype:
            raise RecipeError(
                "A GGUF file has types of its own: give --type f32, f16, bf16, q8_0 or q4_0, and no --dtype."
            )
        with _progress(default_progress(quiet)) as progress:
            facts = gguf_command(
                model, output, kind=kind or "q8_0", embeddings=embeddings, imatrix=imatrix, pre_tokenizer=pre_tokenizer,
                force=force, progress=progress,
            )  # fmt: skip
        print(json.dumps(facts) if as_json else gguf_text(facts))
        return
    if kind or embeddings or imatrix or pre_tokenizer:
        raise RecipeError(
            "--type, --embeddings, --imatrix and --pre-tokenizer are for GGUF: let the output end in .gguf."
        )
    note = note_of(model, output)
    if note:
        print(f"note: {note}", file=sys.stderr)
    step = {"method": "passthrough", "models": [model], "exclude": ["*"]}
    recipe = {"steps": [step], "output": {"shard_size": shard_size, **({"dtype": dtype} if dtype else {})}}
    _execute({**recipe, "allow_non_finite": True}, output, False, force, None, "", as_json, quiet)


@app.command(epilog="Example: weft bake base/ --adapter a/ --adapter b/=0.5 --dtype bfloat16 -o model/")
def bake(
    base: Annotated[str, typer.Argument(help="The model that the adapters were trained on: folder, file, Hub id.")],
    adapter: Annotated[
        list[str], typer.Option("--adapter", "-a", help="Folder of PEFT or weft; a/=0.5 halves its change. Repeat it.")
    ],
    output: Out,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16 (default: as the base).")] = "",
    shard_size: Annotated[str, typer.Option("--shard-size", help="Largest output file.")] = "5GB",
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
    from weft.cli.show import result_text
    from weft.engine.progress import default_progress
    from weft.engine.run import Options
    from weft.recipe.bake import bake as run_bake
    from weft.recipe.bake import probe_text
    from weft.recipe.size import parse_size

    options = Options(force=force)
    if threads:
        options.threads = threads
    if memory:
        options.memory = parse_size(memory)
    with _progress(default_progress(quiet)) as progress:
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


@app.command("inspect", epilog="Example: weft inspect model/ --plot page.html")
def inspect_(
    model: Annotated[str, typer.Argument(help="Folder, file, base+adapter or Hub id.")],
    tensors: Annotated[str | None, typer.Option("--tensors", help="Glob of tensor names.")] = None,
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Spectral norm and stable rank of matrices (slower).")
    ] = False,
    sort: Annotated[
        str, typer.Option("--sort", help="model (its own order), name, size, rms, outliers, zeros …")
    ] = "model",
    symmetry: Annotated[
        bool, typer.Option("--symmetry", help="Which axes permute together, from config.json alone (loads torch).")
    ] = False,
    limit: Limit = None,
    as_json: Json = False,
    plot: Plot = "",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Show shapes, dtypes, norms, spread, outliers, zeros and NaN of every tensor and layer."""
    if symmetry:
        from weft.view.symmetry import symmetry_command

        if tensors or spectrum or plot or sort != "model":
            raise RecipeError("--symmetry reads no weights: leave --tensors, --spectrum, --sort and --plot out.")
        print(symmetry_command(model, json=as_json, limit=limit))
        return
    from weft.engine.progress import default_progress
    from weft.view.commands import inspect_command

    with _progress(default_progress(quiet)) as progress:
        text = inspect_command(
            model, tensors=tensors, spectrum=spectrum, limit=limit, json=as_json, plot=plot or None, threads=threads,
            progress=progress, sort=sort,
        )  # fmt: skip
    print(text)


@app.command(epilog="Example: weft diff base/ tuned/ --limit 20")
def diff(
    a: Annotated[str, typer.Argument(help="The model that changes are relative to.")],
    b: Annotated[str, typer.Argument(help="The changed model.")],
    tensors: Annotated[str | None, typer.Option("--tensors", help="Glob of tensor names.")] = None,
    sort: Annotated[str, typer.Option("--sort", help="change, model (its own order), name …")] = "change",
    limit: Limit = None,
    as_json: Json = False,
    plot: Plot = "",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Show what changed from one model to another, by tensor and by layer."""
    from weft.engine.progress import default_progress
    from weft.view.commands import diff_command

    with _progress(default_progress(quiet)) as progress:
        text = diff_command(
            a,
            b,
            tensors=tensors,
            limit=limit,
            json=as_json,
            plot=plot or None,
            threads=threads,
            progress=progress,
            sort=sort,
        )
    print(text)


@app.command(epilog="Example: weft extract tuned/ --base base/ --lora-rank 32 -o adapter/")
def extract(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    output: Out,
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
    from weft.engine.progress import default_progress

    with _progress(default_progress(quiet)) as progress:
        report = extract_lora(
            tuned, base, output, rank=lora_rank, alpha=alpha, min_energy=energy, include=tuple(include or ()),
            exclude=tuple(exclude or ()), force=force, progress=progress,
        )  # fmt: skip
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.text())


@app.command(
    context_settings=_METHOD_OPTIONS,
    epilog="Example: weft adapt model/ --method lora --rank 16 --where all-linear -o adapter/",
)
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
    samples: Annotated[int, typer.Option("--samples", min=1, help="Rows of the data, at most.")] = 128,
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
    from weft.engine.progress import default_progress

    _load_plugins(plugin)
    values, names = _method_options(model, method, adapt)
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
        plan.token_rows = _token_rows(token_rows) if token_rows else []
    with _progress(default_progress(quiet)) as progress:
        facts = adapt_command(
            names[0], plan, output or None, data=data, name=name, samples=samples, batch=batch_size, length=length,
            force=force, progress=progress,
        )  # fmt: skip
    print(json.dumps(facts, indent=1) if as_json else adapt_text(facts))


@app.command(
    epilog="Example: weft compare model/ --methods rtn,gptq --bits 4,3 --data texts.jsonl -o compare/",
)
def compare(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a transformers model.")],
    data: Annotated[str, typer.Option("--data", help="Samples: a .jsonl or .txt file, or self.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to make.")],
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
    samples: Annotated[int, typer.Option("--samples", min=1, help="Rows of data, at most.")] = 128,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens a row, at most.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")] = 8,
    pack: Annotated[bool, typer.Option("--pack", help="Texts one after another, cut every --length tokens.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of which rows are taken.")] = 0,
    memory: Annotated[str, typer.Option("--memory", help="For hidden states; the rest goes to files.")] = "1GB",
    plot: Annotated[str, typer.Option("--plot", help="The plot as a picture (.png, needs matplotlib) or page.")] = "",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    plugin: Plugin = None,
) -> None:
    """Quantise a model in several ways on the same data, score each, and say which to take."""
    from weft.calibrate.data import DataOptions
    from weft.cli.compare import compare_command, compare_text
    from weft.engine.progress import default_progress
    from weft.recipe.size import parse_size

    _load_plugins(plugin)
    with _progress(default_progress(quiet)) as progress:
        found = compare_command(
            model, names, bits, data, output, DataOptions(samples, length, batch_size, pack, seed=seed),
            group_size=group_size, held_out=held_out, share=share, mixed=mixed, tolerance=tolerance,
            budget=parse_size(budget) if budget else None, sequential=sequential, keep=keep, memory=parse_size(memory),
            plot=plot, force=force, progress=progress,
        )  # fmt: skip
    print(json.dumps(found, indent=1) if as_json else compare_text(found))
    if all(row["failed"] for row in found["rows"]):
        raise typer.Exit(1)


@app.command(epilog="Example: weft calibrate model/ texts.jsonl -o stats/ --statistics gram,scales --samples 128")
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a transformers model.")],
    data: Annotated[str, typer.Argument(help="A .jsonl or .txt file, or self: what a causal model writes itself.")],
    output: Out,
    statistics: Annotated[
        str,
        typer.Option(
            "--statistics",
            "-s",
            help="Of gram, mean, range, scales, percentiles, routing; with the whole model in memory also gradient, "
            "fisher_exact, fisher_sampled, fisher_empirical.",
        ),
    ] = "gram",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Rows of data, at most.")] = 128,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens a row, at most.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")] = 8,
    pack: Annotated[bool, typer.Option("--pack", help="Texts one after another, cut every --length tokens.")] = False,
    assistant_only: Annotated[
        bool, typer.Option("--assistant-only", help="Of conversations, labels of the assistant's tokens only.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn: rows, texts, labels.")] = 0,
    include: Annotated[list[str] | None, typer.Option("--include", help="Glob of layers (default: all).")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of what is kept: float32 or float64.")] = "float32",
    memory: Annotated[str, typer.Option("--memory", help="For hidden states; the rest goes to files.")] = "1GB",
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Gather statistics of a model on data, block by block, for quantising, pruning and merging."""
    from weft.calibrate.data import DataOptions
    from weft.cli.calibrate import calibrate_command
    from weft.engine.progress import default_progress
    from weft.recipe.size import parse_size

    options = DataOptions(samples, length, batch_size, pack, assistant_only, seed)
    with _progress(default_progress(quiet or dry_run)) as progress:
        text = calibrate_command(
            model, data, output, statistics, options, where=include or [], dtype=dtype, memory=parse_size(memory),
            dry_run=dry_run, force=force, as_json=as_json, progress=progress,
        )  # fmt: skip
    print(text)


app.command(
    context_settings=_METHOD_OPTIONS,
    epilog="Example: weft quantize model/ --method gptq --bits 4 --group-size 128 --data texts.jsonl -o model-w4/",
)(quantizing.quantize)
app.command("eval", epilog="Example: weft eval model-w4/ texts.jsonl --against model/")(quantizing.evaluate)
app.command(epilog="Example: weft check model-w4/ --for vllm --tensor-parallel 2")(quantizing.check)
app.command(epilog='Example: weft generate model-w4/ "def main("')(quantizing.generate)


@app.command(epilog='Example: weft papers "fine-tunes interfere"')
def papers(
    query: Annotated[list[str] | None, typer.Argument(help="Words for your problem, or a paper's key.")] = None,
    have: Annotated[str | None, typer.Option("--have", help="What you have: 'one trained model' …")] = None,
    want: Annotated[
        str | None, typer.Option("--want", help="combine, shrink, adapt, train, edit, measure, predict.")
    ] = None,
    family: Annotated[str | None, typer.Option("--family", help="merge, quantize, prune …")] = None,
    grade: Annotated[str | None, typer.Option("--grade", help="planned, lab, checked or core.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows to show.")] = 10,
    as_json: Json = False,
) -> None:
    """Find the paper for a problem, and how to run its method here."""
    from weft.papers import papers_command

    asked = bool(query or have or want or family or grade)
    print(papers_command(" ".join(query or ()), have, want, family, grade, limit if asked else None, as_json))


@app.command(epilog="Example: weft methods combine")
def methods(
    name: Annotated[str, typer.Argument(help="A goal (combine, shrink …) or a method's id, for its parameters.")] = "",
    as_json: Json = False,
) -> None:
    """List methods by goal, or show one method's parameters."""
    from weft.cli.show import method_text
    from weft.papers import methods_command
    from weft.registry import index

    rows = {r["name"]: r for r in index()}
    if name in rows:
        print(json.dumps(rows[name], indent=1) if as_json else method_text(rows[name]))
        return
    from weft.method import GOALS

    if name and name not in GOALS:
        raise RecipeError(f"{name!r} is neither a goal nor a method.{did_you_mean(name, [*GOALS, *rows])}")
    print(methods_command(name or None, as_json))


@app.command(epilog="Example: weft schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from weft.recipe.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


@app.command(epilog="Example: weft init merge > recipe.yaml")
def init(kind: Annotated[str, typer.Argument(help="merge, slices, chain, soup or mergekit.")] = "merge") -> None:
    """Print a recipe to start from."""
    from weft.cli.show import template

    print(template(kind), end="")


@app.command(epilog="Example: weft doctor --json")
def doctor(as_json: Json = False) -> None:
    """Check the installation: versions, cores, memory, compiled kernels, optional packages."""
    from weft.cli.doctor import examine, text

    findings = examine()
    print(json.dumps(findings, indent=1) if as_json else text(findings))
    if not findings["ok"]:
        raise typer.Exit(1)


@app.command(epilog="Example: weft study ghost-batch-norm --seeds 5")
def study(
    key: Annotated[str, typer.Argument(help="A paper's key; without one, the studies there are.")] = "",
    seeds: Annotated[int, typer.Option("--seeds", min=2, help="Repetitions.")] = 5,
) -> None:
    """Test a paper's claim on real data at a small scale (from a checkout of weft)."""
    from weft.cli.study import run_study, studies

    if not key:
        print("\n".join(studies()))
        return
    print(json.dumps(run_study(key, seeds), indent=1))


@app.command("test-method", epilog="Example: weft test-method my_merge --plugin my_merge.py")
def test_method(
    name: Annotated[str, typer.Argument(help="A method's id.")],
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Run the contract battery on a method, your own included."""
    from weft.contract import run_battery
    from weft.registry import method as find_method

    _load_plugins(plugin)
    results = run_battery(find_method(name))
    failed = [r for r in results if r["outcome"] == "failed"]
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        for row in results:
            print(f"{row['outcome']:8} {row['check']}{': ' + row['reason'] if row['reason'] else ''}")
        print(f"{len(results) - len(failed)} of {len(results)} checks passed")
    if failed:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from weft import __version__

        print(f"weft {__version__}")
        raise typer.Exit()


def _load_plugins(paths: list[str] | None) -> None:
    if paths:
        from weft.registry import load_plugin

        for path in paths:
            load_plugin(path)


def _execute(
    recipe: str | dict[str, Any],
    output: str,
    dry_run: bool,
    force: bool,
    threads: int | None,
    memory: str,
    as_json: bool,
    quiet: bool,
) -> None:
    from contextlib import closing

    from weft.cli.show import plan_facts, plan_text, result_text
    from weft.engine.progress import default_progress
    from weft.engine.run import Options, execute
    from weft.recipe.opened import Opened
    from weft.recipe.run import make_plan
    from weft.recipe.size import parse_size

    options = Options(force=force)
    if threads:
        options.threads = threads
    if memory:
        options.memory = parse_size(memory)
    opened = Opened()
    with closing(opened), _progress(default_progress(quiet or dry_run)) as progress:
        options.progress = progress
        plan = make_plan(recipe, opened, output, options=options, dry_run=dry_run)
        if dry_run:
            facts = plan_facts(plan, options)
            print(json.dumps(facts, indent=1) if as_json else plan_text(facts))
            return
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
        result = execute(plan, output, options)
    facts = {
        "output": output,
        "tensors": result.tensors,
        "resumed": result.resumed,
        "bytes": result.nbytes,
        "seconds": round(result.seconds, 2),
        "notes": result.notes,
    }
    print(json.dumps(facts) if as_json else result_text(facts))


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


@contextmanager
def _progress(progress: Any) -> Iterator[Any]:
    try:
        yield progress
    finally:
        progress.finish()


def _method_options(arguments: list[str], method: str, command: Any) -> tuple[dict[str, Any], list[str]]:
    """``--density 0.5 --normalize false`` as parameters; what is no option is one more model."""
    from weft.registry import method as find_method

    row = find_method(method)
    values: dict[str, Any] = {}
    models: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            models.append(argument)
            continue
        key, equals, text = argument[2:].partition("=")
        key = key.replace("-", "_")
        known = row.parameters
        if key not in known and key.removeprefix("no_") in known and not equals:
            values[key.removeprefix("no_")] = False
            continue
        if key not in known:
            raise RecipeError(
                f"{method} has no option --{key.replace('_', '-')}.{_near_option(key, list(known), command)}"
            )
        if not equals:
            if known[key].type == "bool" and (not rest or rest[0].lower() not in ("true", "false")):
                values[key] = True
                continue
            if not rest:
                raise RecipeError(f"--{key.replace('_', '-')} needs a value.")
            text = rest.pop(0)
        values[key] = _value(text)
    return values, models


def _near_option(key: str, known: list[str], command: Any) -> str:
    """The nearest of a method's options and of the command's own; if none is near, the method's."""
    from inspect import get_annotations

    said = get_annotations(command, eval_str=True).values()
    marks = [o for one in said for o in getattr(one, "__metadata__", ())]
    own = [n for o in marks for n in (o.default, *(o.param_decls or ())) if isinstance(n, str) and n[:2] == "--"]
    near = did_you_mean("--" + key.replace("_", "-"), [*("--" + k.replace("_", "-") for k in known), *own])
    if near.startswith(" Did"):
        return near
    return f"{did_you_mean(key, known)} `weft {command.__name__} --help` lists the command's own."


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


def _token_rows(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--token-rows: {text!r} is no list of token ids; write them like 32000,32001.") from None


def _numbers(text: str) -> list[str]:
    for part in text.split(","):
        try:
            float(part)
        except ValueError:
            raise RecipeError(f"--weights: {part!r} is not a number; write them like 0.5,0.3,0.2.") from None
    return text.split(",")


def _value(text: str) -> Any:
    """A number, true or false, a list of numbers, or text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return [float(p) for p in text.split(",")] if "," in text else float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
