"""What a walk will gather and how large it is, from the headers of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.calibrate.check import check_architecture, small, small_batch
from weft.calibrate.collect import STATISTICS, check_choice
from weft.calibrate.collectors import KINDS
from weft.calibrate.experts import unfused
from weft.calibrate.gradients import GRADIENTS
from weft.calibrate.source import FromCheckpoint, find_blocks
from weft.calibrate.sums import BINS, PANEL
from weft.calibrate.watch import Watch, check_what, experts_of, layers_of
from weft.checkpoint.checkpoint import Checkpoint
from weft.function.where import Selector, matches


@dataclass
class CollectionPlan:
    """What will be gathered.

    Attributes:
        what: kinds of statistics.
        blocks: blocks of the model.
        layers: layers whose inputs are counted.
        inputs: distinct tensors that they are given, each counted once.
        nbytes: bytes of the statistics on disk.
        memory: bytes in memory at most, beside the program itself: a block's weights, its sums, hidden states within their
            budget; for gradients the whole model.
    """

    what: list[str]
    blocks: int
    layers: int
    inputs: int
    nbytes: int
    memory: int


def plan_collection(
    checkpoint: Checkpoint,
    what: str | Iterable[str],
    *,
    where: Selector = "*",
    dtype: str = "float32",
    memory: int = 1 << 30,
    check: bool = True,
) -> CollectionPlan:
    """The plan of :func:`weft.calibrate.collect` for a checkpoint; its weights are not read.

    Which layers are given the same tensor is found out on a small copy of the architecture.

    Raises:
        RecipeError: a statistic is not known, or nothing was chosen.
        CheckpointError: the checkpoint cannot be walked.
    """
    kinds = check_what(what, STATISTICS)
    source = FromCheckpoint(checkpoint)
    if check:
        check_architecture(type(source.model), source.model.config)
    inputs = [k for k in kinds if k not in GRADIENTS]
    if inputs:
        check_choice(source, inputs, where)
    leaders = leaders_of_small(type(source.model), source.model.config)
    width = 8 if dtype == "float64" else 4
    plan = CollectionPlan(kinds, len([n for s in source.stacks for n in s]), 0, 0, 0, 0)
    with unfused(source.model) as experts:
        every = {**layers_of(source.model), **experts}
        for stack, small_blocks in zip(source.stacks, leaders):
            for number, block in enumerate(stack):
                shared = small_blocks[min(number, len(small_blocks) - 1)]
                chosen = {n: m for n, m in every.items() if n.startswith(f"{block}.") and matches(where, n, m)}
                first: dict[str, nn.Module] = {}
                for name, module in chosen.items() if set(inputs) & set(KINDS) else ():
                    path = name.removeprefix(f"{block}.")
                    first.setdefault(shared.get(path, path), module)
                    plan.layers += 1
                sums = kept = largest = 0
                for module in first.values():
                    one_sum, one_kept, product = _sizes(module, inputs, width)
                    sums, kept, largest = sums + one_sum, kept + one_kept, max(largest, product)
                if "routing" in inputs:
                    routed = experts_of(source.model.get_submodule(block))
                    kept += sum((8 + width) * len(m.down_proj) for m in routed.values())
                weights = sum(p.nbytes for p in source.model.get_submodule(block).parameters())
                plan.inputs += len(first)
                plan.nbytes += kept
                plan.memory = max(plan.memory, weights + sums + largest + memory)
    wanted = [k for k in kinds if k in GRADIENTS]
    if wanted:
        counted = sum(
            p.numel()
            for n, m in source.model.named_modules()
            if matches(where, n, m)
            for p in m.parameters(recurse=False)
        )
        plan.nbytes += width * counted * len(wanted)
        plan.memory = max(plan.memory, 2 * checkpoint.nbytes + 8 * checkpoint.parameters * len(wanted))
    return plan


def _sizes(module: Any, what: Sequence[str], width: int) -> tuple[int, int, int]:
    """Bytes of a layer's sums, of what is kept of them, and of the product of one batch."""
    groups = getattr(module, "groups", 1)
    if hasattr(module, "kernel_size"):
        channels, row = module.in_channels, module.weight[0].numel()
    else:
        channels = row = getattr(module, "in_features", module.weight.shape[0])
    size = groups * row**2
    vectors = channels * sum({"mean": 1, "range": 2, "scales": 3}.get(k, 0) for k in what)
    counts = 8 * BINS if "percentiles" in what else 0
    size = size if "gram" in what else 0
    product = 4 * min(size, groups * row * PANEL)
    return 8 * (size + vectors) + counts, width * (size + vectors) + counts, product


def leaders_of_small(model_class: Any, config: Any) -> list[list[dict[str, str]]]:
    """For each block of a small copy, the first layer of those that are given the same tensor, by paths in the block."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class._from_config(small(config), dtype=torch.float32).eval()
        with Watch(layers_of(model), ["mean"]) as watch:
            model(**small_batch(model))
    found = []
    for stack in find_blocks(model):
        blocks = []
        for block in stack:
            prefix = f"{block}."
            inside = {n: first for n, first in watch.leaders.items() if n.startswith(prefix)}
            blocks.append({n.removeprefix(prefix): first.removeprefix(prefix) for n, first in inside.items()})
        found.append(blocks)
    return found
