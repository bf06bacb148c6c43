"""``weft quantize``, ``eval``, ``check`` and ``generate``: what the commands do."""

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
from weft.cli.show import size
from weft.engine.progress import Progress
from weft.errors import RecipeError

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
            memory=request.memory, shard_bytes=request.shard_bytes, force=request.force, progress=progress, timings=timings,
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
    write_report(made, before=before, seconds=seconds, layer_seconds=timings, peak_memory=peak, scores=scores)
    return json.dumps(facts) if as_json else _text(facts)


def configuration(request: Request) -> tuple[dict[str, Any], Change, str]:
    """The recipe in words, the configuration, and the format of files.

    Raises:
        RecipeError: a method, a scheme or a parameter is wrong, or they do not go together.
    """
    from weft.quantize.schemes import find_scheme
    from weft.registry import method as find_method

    name, values, file_format = request.method, dict(request.values), request.file_format
    if request.scheme:
        scheme = find_scheme(request.scheme)
        if name and name != scheme.method and not scheme.grid:
            raise RecipeError(f"The scheme {request.scheme} is made by {scheme.method}; leave --method out.")
        name = name or (("gptq" if request.data or request.statistics else "rtn") if scheme.grid else scheme.method)
        known = find_method(name).parameters
        bits = values.get("bits", scheme.parameters.get("bits"))
        if bits != scheme.parameters.get("bits"):
            raise RecipeError(
                f"{request.scheme.upper()} has {scheme.parameters['bits']} bits, and --bits {bits} was given."
            )
        values = {**{k: v for k, v in scheme.parameters.items() if k in known}, **values}
        file_format = scheme.file_format if file_format == "auto" else file_format
    if not name:
        raise RecipeError("Say how: --method awq --bits 4 --data texts.jsonl, or --scheme W8A16, which needs no data.")
    row = find_method(name)
    if row.family != "quantize":
        raise RecipeError(f"{name} does not quantise ({row.family}); `weft methods quantize` lists what does.")
    config = row.configure(values)
    packs = file_format in ("auto", "pack-quantized") and getattr(config, "file_format", "") == "pack-quantized"
    if packs and "kind" not in values and "kind" in row.parameters and "symmetric" in row.parameters["kind"].choices:
        config = row.configure({**values, "kind": "symmetric"})  # which every program loads
    return {"method": name, "parameters": asdict(config), "scheme": request.scheme}, config, file_format


def evaluate_command(
    model: str,
    data: str,
    against: str,
    options: DataOptions,
    *,
    backend: str,
    limit: int,
    as_json: bool,
    progress: Progress,
) -> str:
    """What ``weft eval`` prints."""
    from weft.quantize.evaluate import evaluate

    batches = _read(model, data, options, progress)
    facts: dict[str, Any] = evaluate(model, batches, against or None, backend=backend, progress=progress)
    facts["bytes"] = _file_bytes(model)
    if against:
        facts["bytes_against"] = _file_bytes(against)
        facts["layers"] = layer_errors(model, against)
    if as_json:
        return json.dumps(facts)
    lines = [f"{_LABELS[k]:22} {_number(k, v)}" for k, v in facts.items() if k in _LABELS]
    if against and limit:
        worst = sorted(facts["layers"].items(), key=lambda item: -item[1])[:limit]
        lines += ["", f"error of weights, worst {len(worst)} of {len(facts['layers'])}"]
        lines += [f"  {error:8.4f}  {name}" for name, error in worst]
    return "\n".join(lines)


def layer_errors(model: str, against: str) -> dict[str, float]:
    """‖Ŵ − W‖ / ‖W‖ of every tensor that differs, one at a time in memory."""
    found = {}
    with closing(open_checkpoint(model)) as mine, closing(open_checkpoint(against)) as theirs:
        for name, tensor in mine.items():
            if name not in theirs or theirs[name].shape != tensor.shape or not tensor.dtype.floating:
                continue
            before = theirs[name].torch().double()
            error, norm = float((tensor.torch().double() - before).norm()), float(before.norm())
            if error:
                found[name] = error / norm if norm else error
    return found


def check_command(model: str, target: str, tensor_parallel: int, *, as_json: bool) -> tuple[str, bool]:
    """What ``weft check`` prints, and whether the model will load."""
    from weft.quantize.serving import check_serving

    with closing(open_checkpoint(model)) as checkpoint:
        findings = check_serving(checkpoint, target, tensor_parallel)
    fine = not any(f.level == "error" for f in findings)
    if as_json:
        facts = [{"level": f.level, "text": f.text, "layers": list(f.layers)} for f in findings]
        return json.dumps({"loads": fine, "findings": facts}, indent=1), fine
    lines = [
        f"{f.level:8} {f.text}" + (f"\n{'':9}{', '.join(f.layers[:5])}{' …' * (len(f.layers) > 5)}" if f.layers else "")
        for f in findings
    ]
    return "\n".join([*lines, f"{target} {'loads this model' if fine else 'will not load this model'}"]), fine


def generate_command(
    model: str, prompt: str, *, tokens: int, temperature: float, seed: int, dtype: str, backend: str, as_json: bool,
    progress: Progress,
) -> None:  # fmt: skip
    """Print the text as it is made."""
    import torch

    from weft.calibrate.data import load_tokenizer
    from weft.checkpoint.dtypes import dtype_of
    from weft.quantize.load import load_quantized

    with closing(open_checkpoint(model)) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.folder or Path())
        network = load_quantized(checkpoint, backend=backend, progress=progress)
    progress.finish()
    if not hasattr(network, "generate") or not network.can_generate():
        raise RecipeError(f"{model}: {type(network).__name__} does not write text; give a causal language model.")
    if dtype:
        network.to(getattr(torch, dtype_of(dtype).torch))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise RecipeError("The prompt is empty; give the text that is to be written on.")
    torch.manual_seed(seed)
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0}
    if tokenizer.pad_token_id is not None or tokenizer.eos_token_id is not None:
        options["pad_token_id"] = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    streamer = None
    if not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    began = time.perf_counter()
    made = network.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)[0]
    seconds = time.perf_counter() - began
    new = len(made) - ids.shape[1]
    if as_json:
        text = tokenizer.decode(made, skip_special_tokens=True)
        print(
            json.dumps(
                {
                    "text": text,
                    "tokens": new,
                    "seconds": round(seconds, 3),
                    "tokens_per_second": round(new / seconds, 2),
                }
            )
        )
    else:
        print(f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} a second", file=sys.stderr)


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
    candidates = {str(bits): replace(whole, bits=bits) for bits in request.widths}
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
        "bytes": _file_bytes(str(made)),
        "seconds": seconds,
        "memory_estimated": plan["memory"],
        "memory_peak": peak,
    }


def _text(facts: dict[str, Any]) -> str:
    ratio = facts["bytes_before"] / max(facts["bytes"], 1)
    lines = [
        f"wrote {facts['output']}: {facts['layers']} layers by {facts['method']}, {size(facts['bytes'])} "
        f"({ratio:.2f} times smaller) in {facts['seconds']:.1f} s, at most {size(facts['memory_peak'])} of memory",
        f"evidence: {Path(facts['output']) / 'report.html'}",
    ]
    for key, value in facts.get("scores", {}).items():
        if key in _LABELS:
            lines.append(f"{_LABELS[key]:22} {_number(key, value)}")
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


def _read(model: str, data: str, options: DataOptions, progress: Progress) -> Batches:
    with closing(open_checkpoint(model)) as checkpoint:
        return read_for(checkpoint, data, options, [], progress)


def _file_bytes(model: str) -> int:
    path = Path(model).expanduser()
    if path.is_dir():
        return sum(p.stat().st_size for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf"))
    if path.is_file():
        return path.stat().st_size
    with closing(open_checkpoint(model)) as checkpoint:
        return checkpoint.nbytes


_LABELS = {
    "perplexity": "perplexity",
    "original_perplexity": "  of the original",
    "accuracy": "accuracy",
    "kl": "KL to the original",
    "top1_agreement": "same likeliest token",
    "cosine_distance": "1 − cos",
    "output_error": "error of outputs",
    "tokens": "tokens",
    "tokens_per_second": "tokens a second",
    "bytes": "size",
    "bytes_against": "  of the original",
}


def _number(key: str, value: float) -> str:
    if key.startswith("bytes"):
        return size(int(value))
    return f"{value:,.0f}" if key == "tokens" else f"{value:.4g}"
