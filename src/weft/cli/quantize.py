"""``weft quantize``: what the command does."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.calibrate import Change
from weft.calibrate.data import SELF, DataOptions
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.cli.calibrate import read_for
from weft.cli.quantized import file_bytes, score_lines
from weft.cli.show import size
from weft.engine.progress import Progress
from weft.errors import RecipeError
from weft.view.evidence import REPORT_FILE, report_page
from weft.view.write import write_page

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Request:
    """What a user of ``weft quantize`` said."""

    model: str
    output: str
    method: str
    scheme: str
    values: dict[str, Any]
    data: str
    statistics: str
    file_format: str
    where: list[str]
    head_bits: int
    embedding_bits: int
    target_bytes: int
    target_bits: float
    widths: tuple[int, ...]
    skip_errors: bool
    samples: int
    length: int
    batch_size: int
    pack: bool
    seed: int
    evaluate: str
    autocast: bool
    memory: int
    shard_bytes: int
    force: bool

    @property
    def options(self) -> DataOptions:
        """How samples are cut."""
        return DataOptions(self.samples, self.length, self.batch_size, self.pack, seed=self.seed)


def quantize_command(request: Request, *, dry_run: bool, as_json: bool, progress: Progress) -> str:
    """What the command prints."""
    from weft.engine.checkpoint_writer import check_target
    from weft.engine.journal import WorkFolder
    from weft.quantize.evaluate import evaluate
    from weft.quantize.plan import peak_memory, plan_quantization
    from weft.quantize.report import write_report
    from weft.quantize.run import quantize_model

    began = time.monotonic()
    recipe, config, file_format = configuration(request)
    with closing(open_checkpoint(request.model)) as checkpoint:
        target = Path(request.output).expanduser().absolute()
        if not WorkFolder(target).published:
            check_target(checkpoint, target, request.force)
        batches = _batches(checkpoint, request, _changes(config), dry_run, progress)
        changes = _with_rest(config, checkpoint, request)
        plan = plan_quantization(
            checkpoint, changes, batches, where=request.where or "*", format=file_format, memory=request.memory
        )
        if dry_run:
            if request.target_bytes or request.target_bits:  # nothing is measured yet
                plan |= {"bytes": request.target_bytes, "target_bits": request.target_bits}
            facts = {**plan, "output": request.output, **recipe}
            return json.dumps(facts, indent=1) if as_json else _plan_text(facts)
        if not as_json:
            print(
                f"memory at most {size(plan['memory'])}, of which hidden states {size(plan['hidden'])}", file=sys.stderr
            )
        if request.target_bytes or request.target_bits:
            changes, recipe, file_format = _chosen(checkpoint, changes, request, batches, recipe, file_format, progress)
        held_out = read_for(checkpoint, request.evaluate, request.options, [], progress) if request.evaluate else []
        timings: dict[str, float] = {}
        made = quantize_model(
            checkpoint, request.output, changes, batches, format=file_format, where=request.where or "*",
            statistics=request.statistics or None, recipe=recipe, seed=request.seed, skip_errors=request.skip_errors,
            memory=request.memory, shard_bytes=request.shard_bytes, force=request.force, autocast=request.autocast,
            progress=progress, timings=timings,
        )  # fmt: skip
        before = checkpoint.nbytes
    seconds, peak = round(time.monotonic() - began, 1), peak_memory()
    facts = _facts(made, before, recipe, seconds, peak, plan)
    scores: dict[str, dict[str, float]] = {}
    if request.evaluate:
        scores = {
            "before": evaluate(request.model, held_out, progress=progress),
            "after": evaluate(made, held_out, request.model, progress=progress),
        }
        facts["scores"] = {**scores["after"], **{f"original_{k}": v for k, v in scores["before"].items()}}
    report = write_report(made, before=before, seconds=seconds, layer_seconds=timings, peak_memory=peak, scores=scores)
    write_page(made / REPORT_FILE, report_page(report))
    return json.dumps(facts) if as_json else _text(facts)


def configuration(request: Request) -> tuple[dict[str, Any], Change, str]:
    """The recipe in words, the configuration, and the format of files.

    Raises:
        RecipeError: a method, a scheme or a parameter is wrong, or they do not go together.
    """
    from weft.quantize.schemes import SCHEMES, find_scheme
    from weft.registry import method as find_method

    name, values, file_format = request.method, dict(request.values), request.file_format
    scheme = find_scheme(request.scheme) if request.scheme else None
    if scheme is not None:
        fitted = scheme.grid and (request.data or request.statistics)
        name = name or ("gptq" if fitted else scheme.method)
        known = find_method(name).parameters
        if name != scheme.method and not (scheme.grid and {"bits", "group_size", "kind"} <= set(known)):
            grids = ", ".join(n for n, s in SCHEMES.items() if s.grid)
            raise RecipeError(
                f"The scheme {scheme.name} is made by {scheme.method}, and there is no {name} of it: its weights are rounded to "
                f"nearest. Leave --method out, or take a scheme that other methods can make: {grids}."
                if not scheme.grid
                else f"{name} makes no grids of bits, groups and kind, which the scheme {scheme.name} is. Take a method such as "
                f"gptq or awq, or leave --method out."
            )
        bits = values.get("bits", scheme.parameters.get("bits"))
        if bits != scheme.parameters.get("bits"):
            raise RecipeError(
                f"{scheme.name} has {scheme.parameters.get('bits', 'fixed')} bits, and --bits {bits:g} was given."
            )
        values = {**{k: v for k, v in scheme.parameters.items() if k in known}, **values}
        file_format = scheme.file_format if file_format == "auto" else file_format
    if not name:
        raise RecipeError(
            "Say how: --method awq --bits 4 --data texts.jsonl, or --scheme FP8_DYNAMIC, which needs no data."
        )
    row = find_method(name)
    if row.family != "quantize":
        raise RecipeError(f"{name} does not quantise ({row.family}); `weft methods shrink` lists what does.")
    config = row.configure(values)
    packs = file_format in ("auto", "pack-quantized") and getattr(config, "file_format", "") == "pack-quantized"
    if packs and "kind" not in values and "kind" in row.parameters and "symmetric" in row.parameters["kind"].choices:
        config = row.configure({**values, "kind": "symmetric"})  # which every program loads
    recipe = {"method": name, "parameters": asdict(config), "scheme": request.scheme}
    if scheme is not None and scheme.inputs:
        config, recipe["inputs"] = scheme.around(config), scheme.inputs
    return recipe, config, file_format


def _changes(config: Any) -> list[Change]:
    return list(config.values()) if isinstance(config, dict) else [config]


def _batches(
    checkpoint: Checkpoint, request: Request, changes: list[Change], dry_run: bool, progress: Progress
) -> Batches | None:
    runs = any(c.runs_blocks() for c in changes)
    needs = runs or any(c.needs for c in changes)
    if request.data and (needs or request.target_bytes or request.target_bits):
        if dry_run and request.data == SELF:
            import torch

            return [{"input_ids": torch.zeros(request.samples, request.length, dtype=torch.long)}]
        return read_for(checkpoint, request.data, request.options, [], progress)
    if needs and not request.statistics:
        raise RecipeError(
            f"{request.method or request.scheme} needs data: --data texts.jsonl, or --data self"
            f"{'' if runs else ', or --statistics'}."
        )
    if runs:
        raise RecipeError(
            f"{request.method} runs blocks over data, so that --statistics alone do not do: add --data texts.jsonl, or --data self."
        )
    return None


def _with_rest(config: Change, checkpoint: Checkpoint, request: Request) -> Any:
    """The configuration, and those of the head and the embeddings where they are asked for."""
    if not request.head_bits and not request.embedding_bits:
        return config
    from weft.calibrate.source import FromCheckpoint
    from weft.quantize.rtn import RTN

    network = FromCheckpoint(checkpoint).model
    names = {id(m): n for n, m in network.named_modules()}
    group = getattr(config, "group_size", 0)
    changes: dict[Any, Change] = {"*": config}
    for bits, module, what in (
        (request.embedding_bits, network.get_input_embeddings(), "embeddings"),
        (request.head_bits, network.get_output_embeddings(), "head"),
    ):
        if bits and module is None:
            raise RecipeError(
                f"{type(network).__name__} has no {what}; leave --{'head' if what == 'head' else 'embedding'}-bits out."
            )
        if bits:
            size = group if group and module.weight.shape[1] % group == 0 else 0
            changes[names[id(module)]] = RTN(bits, size, "symmetric")
    return changes


def _chosen(
    checkpoint: Checkpoint, config: Any, request: Request, batches: Batches | None, recipe: dict[str, Any],
    file_format: str, progress: Progress,
) -> tuple[Any, dict[str, Any], str]:  # fmt: skip
    """Bits layer by layer within a budget; the recipe with them; the format in which they were counted."""
    from weft.quantize.choose import choose_bits
    from weft.registry import method as find_method

    if request.target_bytes and request.target_bits:
        raise RecipeError("Give --target-size or --target-bits, one of them.")
    if batches is None and not request.statistics:
        raise RecipeError(
            "--target-size and --target-bits choose by errors on data: add --data texts.jsonl, or --data self."
        )
    row = find_method(recipe["method"])
    if "bits" not in row.parameters:
        raise RecipeError(f"{row.name} has no --bits that could be chosen; take a method that has, such as gptq.")
    whole, others = (
        (config, {}) if not isinstance(config, dict) else (config["*"], {k: v for k, v in config.items() if k != "*"})
    )
    candidates = {str(bits): _with_bits(whole, bits) for bits in request.widths}
    curves = _curves(checkpoint, candidates, batches, request, file_format, progress)
    budget = None
    if request.target_bytes:  # less what is not chosen, as it is
        sizes = (t.natural_dtype.nbytes(t.size) for n, t in checkpoint.items() if n not in checkpoint.aliases)
        rest = sum(sizes) - sum(curves.sizes.values()) * _bytes_of(checkpoint)
        budget = request.target_bytes - rest
        if budget <= 0:
            raise RecipeError(
                f"--target-size of {request.target_bytes:,} bytes cannot be met: what is not quantised, embeddings and head above "
                f"all, takes {rest:,} bytes. Give more."
            )
    target = None if budget is not None else request.target_bits
    found = choose_bits(checkpoint, candidates, batches, target_bits=target, target_bytes=budget, curves=curves)
    bits = {name: int(label) for name, label in found.allocation.choices.items()}
    return {**found.config, **others}, {**recipe, "bits": bits}, found.format


def _with_bits(config: Any, bits: int) -> Change:
    """A configuration, or the one within it for the weights, with other bits."""
    inner = getattr(config, "weights", None)
    made: Change = replace(config, bits=bits) if inner is None else replace(config, weights=_with_bits(inner, bits))
    return made


def _curves(
    checkpoint: Checkpoint, candidates: dict[str, Change], batches: Batches | None, request: Request, file_format: str,
    progress: Progress,
) -> Any:  # fmt: skip
    from weft.quantize.measure_curves import error_curves

    return error_curves(
        checkpoint, candidates, batches, statistics=request.statistics or None, block_errors=batches is not None,
        where=request.where or "*", format=file_format, memory=request.memory, progress=progress,
    )  # fmt: skip


def _bytes_of(checkpoint: Checkpoint) -> int:
    """Bytes of a weight of the model's matrices."""
    sizes = {t.natural_dtype.bits // 8: t.size for t in checkpoint.values() if len(t.shape) == 2}
    return max(sizes, key=lambda width: sizes[width])


def _facts(
    made: Path, before: int, recipe: dict[str, Any], seconds: float, peak: int, plan: dict[str, Any]
) -> dict[str, Any]:
    report = json.loads((made / "weft.json").read_text(encoding="utf-8"))
    layers = report["layers"]
    packed = [f["bits"] for f in layers.values() if "bits" in f]
    return {
        "output": str(made),
        **recipe,
        "layers": len(layers),
        "few_rows": [n for n, f in layers.items() if "few_rows" in f],
        "failed": {n: f["failed"] for n, f in layers.items() if "failed" in f},
        "bits_per_weight": round(sum(packed) / len(packed), 3) if packed else None,
        "bytes_before": before,
        "bytes": file_bytes(str(made)),
        "seconds": seconds,
        "memory_estimated": plan["memory"],
        "memory_peak": peak,
    }


def _text(facts: dict[str, Any]) -> str:
    ratio = facts["bytes_before"] / max(facts["bytes"], 1)
    lines = [
        f"wrote {facts['output']}: {facts['layers']} layers by {facts['method']}, {size(facts['bytes'])} "
        f"({ratio:.2f} times smaller) in {facts['seconds']:.1f} s, at most {size(facts['memory_peak'])} of memory",
        f"evidence: {Path(facts['output']) / REPORT_FILE}",
    ]
    lines += score_lines(facts.get("scores", {}))
    if facts["failed"]:
        lines.append(f"{len(facts['failed'])} layers failed and stay as they were; weft.json says why")
    return "\n".join(lines)


def _plan_text(facts: dict[str, Any]) -> str:
    lines = [
        f"method    {facts['method']} {facts['parameters']}",
        f"layers    {facts['layers']} in {facts['blocks']} blocks",
        f"memory    at most {size(facts['memory'])}, hidden states of {size(facts['hidden'])} included",
        f"output    {_planned(facts)}, from {size(facts['bytes_before'])}",
        "Nothing was written (dry run).",
    ]
    return "\n".join(lines)


def _planned(facts: dict[str, Any]) -> str:
    if facts.get("target_bits"):
        return f"{facts['target_bits']:g} bits a weight on the mean, chosen layer by layer"
    return f"about {size(facts['bytes'])}" if facts["bytes"] else "of a size that is not known beforehand"
