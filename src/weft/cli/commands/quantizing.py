"""Quantising a model, and judging, checking and using what came out."""

from __future__ import annotations

from typing import Annotated

import typer

from weft.cli.arguments import list_of, load_plugins, method_options, progress_shown
from weft.cli.options import (
    Force,
    HiddenMemory,
    Json,
    Length,
    Model,
    OutputFolder,
    Plugin,
    Quiet,
    Samples,
    ShardSize,
)
from weft.errors import RecipeError

Backend = Annotated[
    str, typer.Option("--backend", help="How packed layers multiply: auto, dequantize, int4, int8, integer, triton.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows a batch.")]
Pack = Annotated[bool, typer.Option("--pack", help="Texts one after another, without padding.")]


def quantize(
    model: Annotated[list[str], typer.Argument(help="Folder or Hub id of a transformers model.")],
    output: OutputFolder,
    method: Annotated[
        str, typer.Option("--method", "-m", help="A quantiser's id; `weft methods shrink` lists them.")
    ] = "",
    scheme: Annotated[
        str, typer.Option("--scheme", help="A scheme's name as vLLM knows it: W4A16, W8A8, FP8_DYNAMIC, NVFP4, …")
    ] = "",
    data: Annotated[
        str, typer.Option("--data", help="Samples for methods that need them: .jsonl, .txt, or self.")
    ] = "",
    statistics: Annotated[
        str, typer.Option("--statistics", help="A folder of `weft calibrate`, in the place of data.")
    ] = "",
    file_format: Annotated[
        str, typer.Option("--format", help="Of the files: auto, dense, pack-quantized, gptq, awq, weft, …")
    ] = "auto",
    where: Annotated[
        list[str] | None, typer.Option("--where", help="Layers of the blocks: a glob, a suffix, re:… (default: all).")
    ] = None,
    head_bits: Annotated[
        int, typer.Option("--head-bits", min=0, max=8, help="Round the output head; 0: leave it.")
    ] = 0,
    embedding_bits: Annotated[
        int, typer.Option("--embedding-bits", min=0, max=8, help="Round the embeddings; 0: leave them.")
    ] = 0,
    target_size: Annotated[
        str, typer.Option("--target-size", help="Size of the files: bits are chosen layer by layer.")
    ] = "",
    target_bits: Annotated[
        float, typer.Option("--target-bits", min=0, help="Bits a weight on the mean, chosen layer by layer.")
    ] = 0,
    bits_from: Annotated[str, typer.Option("--bits-from", help="Widths that a target chooses among.")] = "2,3,4,5,6,8",
    on_error: Annotated[
        str, typer.Option("--on-error", help="Where a layer fails: stop, or skip (it stays as it is).")
    ] = "stop",
    samples: Samples = 128,
    length: Length = 512,
    batch_size: BatchSize = 8,
    pack: Pack = False,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
    evaluate: Annotated[
        str, typer.Option("--evaluate", help="Held-out samples: the report has scores against the original.")
    ] = "",
    autocast: Annotated[
        bool,
        typer.Option("--autocast/--no-autocast", help="Calibrate float32 and float16 models in bfloat16 products."),
    ] = True,
    memory: HiddenMemory = "1GB",
    shard_size: ShardSize = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate memory and size, and write nothing.")] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    plugin: Plugin = None,
) -> None:
    """Quantise a model block by block into packed files, with evidence beside them.

    The method's own parameters are options too: --bits 4 --group-size 128 (see `weft methods awq`). A run that was stopped goes
    on where it was with the same command.
    """
    from weft.cli.quantize import Request, quantize_command
    from weft.recipe.size import parse_size

    load_plugins(plugin)
    values, names = method_options(model, method or _method_of(scheme), quantize)
    if len(names) != 1:
        raise RecipeError(f"weft quantize takes one model, got {names}.")
    if on_error not in ("stop", "skip"):
        raise RecipeError(f"--on-error is stop or skip, got {on_error!r}.")
    widths = tuple(dict.fromkeys(list_of(int, bits_from, "--bits-from", "whole numbers", "3,4,8")))
    request = Request(
        names[0], output, method, scheme, values, data, statistics, file_format, where or [], head_bits, embedding_bits,
        parse_size(target_size) if target_size else 0, target_bits, widths, on_error == "skip", samples, length, batch_size, pack,
        seed, evaluate, autocast, parse_size(memory), parse_size(shard_size), force,
    )  # fmt: skip
    with progress_shown(quiet or dry_run) as progress:
        text = quantize_command(request, dry_run=dry_run, as_json=as_json, progress=progress)
    print(text)


def _method_of(scheme: str) -> str:
    """The method whose parameters are options where none is named."""
    if not scheme:
        return "rtn"
    from weft.quantize.schemes import find_scheme

    return find_scheme(scheme).method


def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(help="Samples to judge by: a .jsonl or .txt file.")],
    against: Annotated[str, typer.Option("--against", help="The model that it was made from.")] = "",
    samples: Samples = 128,
    length: Length = 512,
    batch_size: BatchSize = 8,
    pack: Pack = False,
    backend: Backend = "auto",
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Layers to show, worst first.")] = 10,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity or fidelity of a model, its distance from another, errors by layer, size and speed."""
    from weft.calibrate.data import DataOptions
    from weft.cli.quantized import evaluate_command

    with progress_shown(quiet) as progress:
        text = evaluate_command(
            model, data, against, DataOptions(samples, length, batch_size, pack), backend=backend, limit=limit,
            as_json=as_json, progress=progress,
        )  # fmt: skip
    print(text)


def check(
    model: Model,
    target: Annotated[str, typer.Option("--for", help="What is to load it: vllm, transformers, llama.cpp.")] = "vllm",
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", min=1, help="GPUs that share each layer.")] = 1,
    as_json: Json = False,
) -> None:
    """Will a quantised model load, and be fast: group sizes against shards, kernels' multiples, names, schemes."""
    from weft.cli.quantized import check_command

    text, fine = check_command(model, target, tensor_parallel, as_json=as_json)
    print(text)
    if not fine:
        raise typer.Exit(1)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="How the text begins.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many new ones.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: the likeliest token each time.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="To compute in: bfloat16, float32 (default: as the model).")
    ] = "",
    backend: Backend = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a language model write on, with weft's own kernels for packed layers."""
    from weft.cli.quantized import generate_command

    with progress_shown(quiet) as progress:
        generate_command(
            model, prompt, tokens=tokens, temperature=temperature, seed=seed, dtype=dtype, backend=backend, as_json=as_json,
            progress=progress,
        )  # fmt: skip
