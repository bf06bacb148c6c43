"""``weft calibrate``: statistics of a model on data, in a folder."""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.calibrate.collect import collect
from weft.calibrate.data import IGNORED, SELF, DataOptions, load_tokenizer, own_batches, read_batches
from weft.calibrate.facts import check_target
from weft.calibrate.gradients import GRADIENTS
from weft.calibrate.plan import plan_collection
from weft.calibrate.source import whole_model
from weft.calibrate.watch import check_what
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.cli.show import size
from weft.engine.progress import Progress
from weft.errors import CheckpointError, RecipeError


def calibrate_command(
    model: str,
    data: str,
    output: str,
    statistics: str,
    options: DataOptions,
    *,
    where: list[str],
    dtype: str,
    memory: int,
    dry_run: bool,
    force: bool,
    as_json: bool,
    progress: Progress,
) -> str:
    """What the command prints."""
    from weft.calibrate.collect import STATISTICS

    began = time.monotonic()
    kinds = check_what(statistics, STATISTICS)
    check_target(output, force)
    with closing(open_checkpoint(model)) as checkpoint:
        if dry_run:
            return _dry_run(checkpoint, data, kinds, options, where or "*", dtype, memory, as_json)
        batches = read_for(checkpoint, data, options, kinds, progress)
        found = collect(
            checkpoint, batches, kinds, where=where or "*", memory=memory, dtype=dtype, seed=options.seed, output=output,
            force=force, progress=progress,
        )  # fmt: skip
    facts = {
        "output": output,
        "statistics": kinds,
        "layers": len(found.layers),
        "tensors": len(found.names),
        "bytes": found.nbytes,
        "tokens": _tokens(batches),
        "seconds": round(time.monotonic() - began, 2),
    }
    if as_json:
        return json.dumps(facts)
    return (
        f"wrote {output}: {', '.join(kinds)} of {facts['layers']} layers from {facts['tokens']:,} tokens, "
        f"{size(found.nbytes)} in {facts['seconds']:.1f} s"
    )


def _dry_run(
    checkpoint: Checkpoint, data: str, kinds: list[str], options: DataOptions, where: Any, dtype: str, memory: int, as_json: bool
) -> str:  # fmt: skip
    plan = plan_collection(checkpoint, kinds, where=where, dtype=dtype, memory=memory)
    tokens = (
        options.samples * options.length
        if data == SELF
        else _tokens(read_for(checkpoint, data, options, kinds, Progress()))
    )
    facts = {**asdict(plan), "tokens": tokens}
    if as_json:
        return json.dumps(facts, indent=1)
    lines = [
        f"gathers   {', '.join(plan.what)}",
        f"layers    {plan.layers} in {plan.blocks} blocks, which are given {plan.inputs} tensors",
        f"data      {tokens:,} tokens{' that the model writes itself' if data == SELF else ''}",
        f"output    {size(plan.nbytes)}",
        f"memory    at most {size(plan.memory)}, hidden states of {size(memory)} included",
        "Nothing was written (dry run).",
    ]
    return "\n".join(lines)


def read_for(
    checkpoint: Checkpoint, data: str, options: DataOptions, kinds: list[str], progress: Progress
) -> list[dict[str, Tensor]]:
    """Batches as the model takes them."""
    problem: CheckpointError | None = None
    tokenizer = None
    try:
        tokenizer = load_tokenizer(checkpoint.folder or Path())
    except CheckpointError as error:
        problem = error  # not needed for token ids
    if data == SELF:
        with whole_model(checkpoint) as whole:
            batches = own_batches(whole, tokenizer, options, progress)
    else:
        try:
            batches = read_batches(data, tokenizer, options)
        except RecipeError as error:
            if problem is not None and "tokenizer" in str(error):
                raise problem from None
            raise
    config = checkpoint.config
    vocabulary = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    largest = max(int(b["input_ids"].max()) for b in batches)
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise RecipeError(
            f"The data holds token {largest}, and the model knows {vocabulary}; the ids are of another tokenizer. Give texts, "
            "or ids of the model's own."
        )
    longest = max(b["input_ids"].shape[1] for b in batches)
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and longest > positions:
        raise RecipeError(
            f"The data has rows of {longest} tokens, and the model has {positions} positions; give --length {positions}."
        )
    for batch in batches:
        if config.get("is_encoder_decoder"):  # labels become the decoder's inputs
            batch["decoder_attention_mask"] = (batch["labels"] != IGNORED).long()
        elif not set(kinds) & set(GRADIENTS):
            del batch["labels"]  # not every model takes them
    return batches


def _tokens(batches: list[dict[str, Tensor]]) -> int:
    return sum(int(b["attention_mask"].sum()) for b in batches)
