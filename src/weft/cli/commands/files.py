"""Files of weights: written in another form, looked at, and set side by side."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from weft.cli.arguments import progress_shown
from weft.cli.options import Dtype, Force, Json, Quiet, ShardSize, Threads
from weft.errors import RecipeError

Tensors = Annotated[str | None, typer.Option("--tensors", help="Glob of tensor names.")]
Limit = Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Rows to show.")]
Plot = Annotated[str, typer.Option("--plot", help="Write an HTML page with plots.")]


def convert(
    model: Annotated[str, typer.Argument(help="What to read: .bin, .pt, .gguf, folder, base+adapter, Hub id.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to make, or one file that ends in .safetensors or .gguf.")
    ],
    dtype: Dtype = "",
    shard_size: ShardSize = "5GB",
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
    from weft.cli.execute import execute_recipe

    if output.endswith(".gguf"):
        if dtype:
            raise RecipeError(
                "A GGUF file has types of its own: give --type f32, f16, bf16, q8_0 or q4_0, and no --dtype."
            )
        with progress_shown(quiet) as progress:
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
    execute_recipe(
        {**recipe, "allow_non_finite": True}, output, dry_run=False, force=force, threads=None, memory="",
        as_json=as_json, quiet=quiet,
    )  # fmt: skip


def inspect_(
    model: Annotated[str, typer.Argument(help="Folder, file, base+adapter or Hub id.")],
    tensors: Tensors = None,
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
    from weft.view.commands import inspect_command

    with progress_shown(quiet) as progress:
        text = inspect_command(
            model, tensors=tensors, spectrum=spectrum, limit=limit, json=as_json, plot=plot or None, threads=threads,
            progress=progress, sort=sort,
        )  # fmt: skip
    print(text)


def diff(
    a: Annotated[str, typer.Argument(help="The model that changes are relative to.")],
    b: Annotated[str, typer.Argument(help="The changed model.")],
    tensors: Tensors = None,
    sort: Annotated[str, typer.Option("--sort", help="change, model (its own order), name …")] = "change",
    limit: Limit = None,
    as_json: Json = False,
    plot: Plot = "",
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Show what changed from one model to another, by tensor and by layer."""
    from weft.view.commands import diff_command

    with progress_shown(quiet) as progress:
        text = diff_command(
            a, b, tensors=tensors, limit=limit, json=as_json, plot=plot or None, threads=threads, progress=progress,
            sort=sort,
        )  # fmt: skip
    print(text)
