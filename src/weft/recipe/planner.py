"""From a recipe to a plan, by reading headers only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft import __version__
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.dtypes import dtype_of
from weft.checkpoint.open import read_json
from weft.engine.merging import MergeMethod, Stage, as_lazy
from weft.engine.plan import LedgerRow, OutputTensor, Plan, split_into_shards
from weft.errors import RecipeError
from weft.kernels.convert import OUTPUT_DTYPES
from weft.recipe.card import model_card
from weft.recipe.chat import choose_template, with_template
from weft.recipe.embeddings import Embeddings
from weft.recipe.opened import Opened
from weft.recipe.schema import Recipe, Step, step_models
from weft.recipe.size import parse_size
from weft.recipe.step import Entry, StepBuilder, check_parameter_names
from weft.recipe.tokenizer_files import TokenizerFiles
from weft.registry import index
from weft.registry import method as find_method

OTHER_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
)


@dataclass
class StepResult:
    """What a step produces, before anything is computed."""

    entries: dict[str, Entry]
    config: dict[str, Any]
    reference: Checkpoint
    checkpoint: Checkpoint
    label: str
    tokenizer: TokenizerFiles
    embeddings: Embeddings


def plan_recipe(
    recipe: Recipe, opened: Opened, *, single_file: str = "", source: Mapping[str, Any] | None = None
) -> Plan:
    """Decide everything about a run.

    Args:
        recipe: what to do.
        opened: its models; stays open while the plan is carried out.
        single_file: name of the one output file, or empty for a folder.
        source: the recipe as the user wrote it, kept in the output; default: ``recipe`` itself.

    Raises:
        RecipeError, CheckpointError: everything that can be known to be wrong from headers.
    """
    ledger: list[LedgerRow] = []
    notes: list[str] = list(recipe.notes)
    results: dict[str, StepResult] = {}
    result = None
    for number, step in enumerate(recipe.steps, 1):
        for name, earlier in results.items():
            opened.add(f"@{name}", earlier.checkpoint, earlier.tokenizer)
        last = number == len(recipe.steps)
        result = _plan_step(step, number, recipe, opened, ledger, notes)
        results[step.name or f"step {number}"] = result
        if not last and not step.name:
            raise RecipeError(
                f"step {number} ({step.method}) has no name, so no later step can use its result. Name it."
            )
    assert result is not None
    return _finish(recipe, result, opened, ledger, notes, single_file, source)


def _plan_step(
    step: Step, number: int, recipe: Recipe, opened: Opened, ledger: list[LedgerRow], notes: list[str]
) -> StepResult:
    method = find_method(step.method)
    if not isinstance(method, MergeMethod):
        entry = next((row for row in index() if row["name"] == method.name), {})
        how = f" Run it as: {entry.get('shell') or entry['call']}" if entry else ""
        raise RecipeError(f"step {number}: {method.name} does not run on checkpoints from a recipe.{how}")
    label = step.name or method.name
    check_parameter_names(step, method, label)
    if step.exclude != ["*"]:  # copying an adapter's own tensors is fine, averaging its factors is not
        for model in step_models(step):
            if opened.get(model).config.get("peft_type"):
                raise RecipeError(
                    f"{model} is an adapter, not a model: averaging factors is not averaging their products. Name it "
                    "with its base (base+adapter), or merge adapters among themselves: "
                    "weft merge adapter1/ adapter2/ --method linear -o adapter/."
                )
    if method.differs:
        notes.append(f"{method.name}: {method.differs}.")
    stage = Stage(method)
    last = number == len(recipe.steps)
    tokenizer = (recipe.output.tokenizer if last else None) or step.tokenizer
    template = (recipe.output.chat_template if last else None) or step.chat_template
    builder = StepBuilder(step, method, stage, recipe, opened, ledger, notes, label, tokenizer)
    entries = builder.build()
    # a later step reads this one's tensors as float32, computed when read
    lazy = {n: _lazy(n, e) for n, e in entries.items()}
    reference, embeddings = builder.reference, builder.embeddings
    files = embeddings.tokenizer
    if template:
        text = choose_template(template, map(opened.tokenizer, step_models(step)))
        if text and not files.exists:
            notes.append(f"{files.name} has no tokenizer, so the chat template is not written.")
        elif text:
            files = with_template(files, text)
    config = embeddings.settle(builder.config, lazy)
    notes += embeddings.notes
    checkpoint = Checkpoint(
        name=f"@{label}", tensors=lazy, aliases={}, config=config, folder=reference.folder, fingerprint=""
    )
    return StepResult(entries, config, reference, checkpoint, label, files, embeddings)


def _lazy(name: str, entry: Entry) -> LazyTensor:
    if isinstance(entry.source, LazyTensor):
        return entry.source
    lazy = as_lazy(entry.source)
    return LazyTensor(lazy.info, lazy.source, entry.dtype)


def _finish(
    recipe: Recipe,
    result: StepResult,
    opened: Opened,
    ledger: list[LedgerRow],
    notes: list[str],
    single_file: str,
    source: Mapping[str, Any] | None,
) -> Plan:
    wanted = dtype_of(recipe.output.dtype) if recipe.output.dtype else None
    if wanted is not None and wanted.name not in OUTPUT_DTYPES:
        raise RecipeError(f"output.dtype {recipe.output.dtype!r}: choose one of float32, float16, bfloat16, float64.")
    outputs = []
    for name, entry in result.entries.items():
        dtype = wanted if wanted is not None and entry.dtype.floating else entry.dtype
        outputs.append(OutputTensor(name, dtype, entry.source, entry.rule))
    config = dict(result.config)
    if wanted is not None and config:
        key = "dtype" if "dtype" in config else "torch_dtype"
        config[key] = wanted.torch
    sizes = {o.name: o.nbytes for o in outputs}
    real = {c.name: c for n, c in opened.checkpoints.items() if not n.startswith("@")}
    names = {n: c.name for n, c in opened.checkpoints.items()}
    written = _rename(source if source is not None else recipe.model_dump(mode="json", exclude_defaults=True), names)
    shards = (
        {single_file: list(sizes)} if single_file else split_into_shards(sizes, parse_size(recipe.output.shard_size))
    )
    files: dict[str, bytes] = {}
    copies: dict[str, Path] = {}
    if not single_file:
        if config:
            files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        folder = result.reference.folder
        if folder is not None:
            copies = {n: folder / n for n in OTHER_FILES if (folder / n).is_file()}
        if "generation_config.json" in copies and result.embeddings.moved:
            generation = result.embeddings.settle_generation(read_json(copies.pop("generation_config.json")))
            files["generation_config.json"] = (json.dumps(generation, indent=2) + "\n").encode()
        copies |= result.tokenizer.copies
        files |= result.tokenizer.written
        if config and not result.tokenizer.exists:
            notes.append(f"{result.reference.name} has no tokenizer files, so the output has none.")
        files["README.md"] = model_card(recipe, written, list(real.values()), config).encode()
    identity = {
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
        "inputs": {n: c.fingerprint for n, c in opened.checkpoints.items() if not n.startswith("@")},
        "paths": [str(c.folder.resolve()) for c in real.values() if c.folder is not None],
        "version": __version__,
    }
    if result.embeddings.fingerprint:
        identity["tokens"] = result.embeddings.fingerprint
    report = {
        "weft": __version__,
        "recipe": written,
        "inputs": {c.name: {"tensors": len(c), "parameters": c.parameters, "bytes": c.nbytes} for c in real.values()},
        "ledger": _ledger_summary(ledger),
        "notes": notes,
    }
    return Plan(
        outputs=outputs,
        shards=shards,
        identity=identity,
        files=files,
        copies=copies,
        single_file=bool(single_file),
        ledger=ledger,
        notes=notes,
        report=report,
    )


def _ledger_summary(ledger: list[LedgerRow]) -> dict[str, dict[str, list[str]]]:
    """model -> rule -> its tensors."""
    summary: dict[str, dict[str, list[str]]] = {}
    for row in ledger:
        summary.setdefault(row.model, {}).setdefault(row.rule, []).append(row.tensor)
    return summary


def _rename(value: Any, names: Mapping[str, str]) -> Any:
    """A copy in which models are called by their names, and no path shows where anything lies on this machine."""
    if isinstance(value, Mapping):
        return {k: _rename(v, names) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rename(v, names) for v in value]
    if not isinstance(value, str) or value in names:
        return names.get(value, value)
    return "+".join(Path(part).name if Path(part).is_absolute() else part for part in value.split("+"))
