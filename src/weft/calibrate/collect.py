"""Gather statistics of a model on data: one walk for everything that is asked for.

From a checkpoint, and of models of transformers in memory, the model is walked block by block, and the layers in its
blocks are counted; of any other module in memory all layers are, in plain forward passes. Gradients need the whole model
in memory.

Peak memory of a walk: the weights of one block, its sums (8 bytes × n² for each distinct tensor of n channels that its
layers are given, and 4 KB × n for a part of a product), and the hidden states within their budget. With an
output folder a block's statistics are written before the next block is loaded, and a run that was stopped goes on there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft
from weft.calibrate import gradients
from weft.calibrate.collectors import KINDS
from weft.calibrate.experts import unfused
from weft.calibrate.facts import Facts
from weft.calibrate.forward import call, digest_of
from weft.calibrate.gradients import GRADIENTS
from weft.calibrate.per_sample import evaluating
from weft.calibrate.sink import FolderSink, MemorySink
from weft.calibrate.source import InMemory, find_blocks, whole_model
from weft.calibrate.statistics import Statistics
from weft.calibrate.walker import Walk
from weft.calibrate.watch import Watch, check_what, experts_of, layers_of
from weft.calibrate.watch_block import block_layers, results_of, two_axes, watched
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.fingerprint import fingerprint_of
from weft.checkpoint.open import open_checkpoint
from weft.engine.progress import Progress
from weft.errors import RecipeError, disk_errors
from weft.function.where import Selector, matches, nearest_names

STATISTICS = (*KINDS, "routing", *GRADIENTS)
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def collect(
    model: nn.Module | Checkpoint | str | Path,
    batches: Iterable[Any],
    what: str | Iterable[str] = ("gram",),
    *,
    labels: Sequence[Tensor] | None = None,
    where: Selector = "*",
    blocks: str | Sequence[str] = (),
    memory: int = 1 << 30,
    dtype: str = "float32",
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of the inputs of a model's layers, of its routing, and of its gradients.

    Args:
        model: a module in memory, or a folder, file, Hub id or open checkpoint of a transformers model.
        batches: calibration data; each a tensor, a tuple of positional or a mapping of named arguments. Tokens that a
            mapping's ``attention_mask`` (rows, tokens) leaves out are not counted.
        what: any of ``gram``, ``mean``, ``range``, ``scales``, ``percentiles`` (of the inputs of layers), ``routing`` (of
            fused experts), ``gradient``, ``fisher_exact``, ``fisher_sampled``, ``fisher_empirical`` (of parameters).
        labels: for gradients, one tensor a batch, where batches are no mappings with ``labels``.
        where: which layers, or for gradients which layers' parameters (:mod:`weft.function.where`).
        blocks: see :class:`weft.calibrate.Walk`; of a module in memory, walk these lists.
        memory: bytes of hidden states to keep in memory.
        dtype: float32 or float64: what is kept of sums, which are float64.
        seed: of the labels that ``fisher_sampled`` draws.
        output: a folder to write to as the walk goes on; without it, statistics are in memory.
        force: replace a folder of statistics; discard an unfinished run.
        check: see :class:`weft.calibrate.Walk`.
        progress: where to report.

    Raises:
        RecipeError: a statistic is not known or not possible with this model and data, or nothing was chosen.
        NonFiniteError: a layer is given NaN or infinite values.
        OutputError: the output exists, or cannot be written.
        CheckpointError: the checkpoint is damaged, cannot be walked, or (gradients) does not fit into memory.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> found = collect(model, [torch.randn(5, 1, 4, 4)], ("gram", "fisher_exact"))
    >>> found.gram("0").shape, found.rows("0"), found.rows("2"), found.fisher("2.bias", "exact").shape
    (torch.Size([9, 9]), 80, 5, torch.Size([2]))
    """
    kinds = check_what(what, STATISTICS)
    if dtype not in _DTYPES:
        raise RecipeError(f"dtype must be float32 or float64, got {dtype!r}.")
    data = list(batches)
    if not data:
        raise RecipeError("There are no calibration batches: the data is empty, or its iterator was used up before.")
    options = {"what": kinds, "where": where if isinstance(where, str) else repr(where), "dtype": dtype, "seed": seed}
    opened = None if isinstance(model, nn.Module) else open_checkpoint(model)
    sink: MemorySink = MemorySink(_DTYPES[dtype]) if output is None else FolderSink(output, force, _DTYPES[dtype])
    try:
        source = model if opened is None else opened
        assert isinstance(source, nn.Module | Checkpoint)
        facts = Facts(provenance=_provenance(source, data, options))
        with disk_errors(output), sink.begin(facts, source):
            inputs = [k for k in kinds if k not in GRADIENTS]
            if inputs:
                if _is_walked(source, blocks):
                    _walk(source, data, inputs, where, blocks, memory, check, sink, facts, progress or Progress())
                else:
                    assert isinstance(source, nn.Module)
                    _run_whole(source, data, inputs, where, sink, facts)
            wanted = [k for k in kinds if k in GRADIENTS]
            if wanted:
                _gradients(source, data, labels, wanted, where, seed, sink, facts)
            return sink.finish(facts, force)
    finally:
        if opened is not None and opened is not model:
            opened.close()


def _is_walked(model: nn.Module | Checkpoint, blocks: str | Sequence[str]) -> bool:
    if isinstance(model, Checkpoint) or blocks:
        return True
    try:
        find_blocks(model)
    except RecipeError:
        return False
    return True


def _walk(
    model: nn.Module | Checkpoint, batches: list[Any], what: Sequence[str], where: Selector, blocks: str | Sequence[str],
    memory: int, check: bool, sink: MemorySink, facts: Facts, progress: Progress,
) -> None:  # fmt: skip
    with Walk(model, batches, blocks=blocks, memory=memory, folder=sink.walk_folder, check=check) as walk:
        check_choice(walk.source, what, where)
        progress.start("calibrating", len(walk), len(walk), "blocks")
        done = 0
        for block in walk:
            for number in range(done, block.number):
                progress.advance(f"block {number} of an earlier run", 1)
            done = block.number + 1
            with watched(block, what, where) as watch:
                block.run(keep=True)
            part = Facts()
            sink.put(f"block-{block.number:05d}", results_of(watch, block_layers(block, where), part), part)
            facts.add(part)
            progress.advance(block.name, 1)


def check_choice(source: InMemory, what: Sequence[str], where: Selector) -> None:
    """Before the first block is loaded: is there anything to count?

    Raises:
        RecipeError: there is not.
    """
    inside = tuple(f"{n}." for stack in source.stacks for n in stack)
    with unfused(source.model) as experts:
        every = {n: m for n, m in {**layers_of(source.model), **experts}.items() if f"{n}.".startswith(inside)}
    known = {id(m) for m in [*every.values(), *experts_of(source.model).values()]}
    unknown = [
        f"{n}.{p}"
        for n, m in source.model.named_modules() if id(m) not in known and n.startswith(inside)
        for p, value in m.named_parameters(recurse=False) if value.dim() > 2
    ]  # fmt: skip
    if unknown:
        warnings.warn(
            f"{unknown[0]} and {len(unknown) - 1} others hold several matrices each, of experts that are not known here; "
            "their inputs are not counted.",
            stacklevel=2,
        )
    chosen = set(what) != {"routing"} and any(matches(where, n, m) for n, m in every.items())
    if not chosen and not ("routing" in what and experts_of(source.model)):
        raise RecipeError(_nothing(where, what, list(every.items())))


def _run_whole(
    model: nn.Module, batches: list[Any], what: Sequence[str], where: Selector, sink: MemorySink, facts: Facts
) -> None:
    """All layers of a module in memory, in plain forward passes."""
    mask: Tensor | None = None
    with unfused(model) as experts, evaluating(model), torch.no_grad():
        every = {**layers_of(model), **experts}
        layers = {n: m for n, m in every.items() if matches(where, n, m)}
        routed = experts_of(model) if "routing" in what else {}
        if not layers and not routed:
            raise RecipeError(_nothing(where, what, list(every.items())))
        with Watch(layers, [k for k in what if k in KINDS], experts=routed, mask=lambda x: mask) as watch:
            for batch in batches:
                mask = two_axes(batch, "attention_mask")
                call(model, batch)
        part = Facts()
        sink.put("model", results_of(watch, layers, part), part)
        facts.add(part)


def _gradients(
    model: nn.Module | Checkpoint, batches: list[Any], labels: Sequence[Tensor] | None, kinds: Sequence[str],
    where: Selector, seed: int, sink: MemorySink, facts: Facts,
) -> None:  # fmt: skip
    whole = whole_model(model, 2, 8 * len(kinds)) if isinstance(model, Checkpoint) else nullcontext(model)
    with whole as network:
        part = Facts()
        chosen = {
            f"{n}.{p}" if n else p: value
            for n, m in network.named_modules() if matches(where, n, m)
            for p, value in m.named_parameters(recurse=False)
        }  # fmt: skip
        if not chosen:
            raise RecipeError(_nothing(where, kinds, list(network.named_modules())))
        part.fingerprints = {n: fingerprint_of(p) for n, p in chosen.items()}
        for kind in kinds:
            if kind == "fisher_exact":
                found = gradients.fisher_exact(network, batches)
            elif kind == "fisher_sampled":
                generator = torch.Generator().manual_seed(seed)
                found = gradients.fisher_sampled(network, batches, labels, generator=generator)
            else:
                function: Callable[..., dict[str, Tensor]] = (
                    gradients.mean_gradient if kind == "gradient" else gradients.fisher_empirical
                )
                found = function(network, batches, labels)
            sink.put(kind, ((f"{n}/{kind}", t) for n, t in found.items() if n in chosen), part)
        facts.add(part)


def _provenance(model: nn.Module | Checkpoint, batches: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    versions = {"weft": weft.__version__, "torch": str(torch.__version__)}
    if isinstance(model, Checkpoint):
        import transformers

        versions["transformers"] = transformers.__version__
    name = model.name if isinstance(model, Checkpoint) else type(model).__name__
    return {
        "versions": versions,
        "model": name,
        "data": digest_of(batches),
        "batches": len(batches),
        "options": options,
    }


def _nothing(where: Selector, what: Sequence[str], layers: list[tuple[str, nn.Module]]) -> str:
    if list(what) == ["routing"]:
        return "The model has no fused experts whose routing could be counted."
    return f"No layer was chosen by {where!r}, of {len(layers)}.{nearest_names(where, layers)}"
