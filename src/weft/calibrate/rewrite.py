"""Change a model on disk block by block, each with statistics of what the changed blocks before it give.

    def change(name, weight, statistics):          # weight (out, in) in float32
        return weight * wanda_mask(weight, statistics.norm(name), sparsity=0.5)

    rewrite("model/", batches, change, "pruned/", what="scales")

A block is loaded, its statistics are gathered from the activations that the changed blocks before it give, its layers are
changed, it is written, it runs over the data with its new weights, and it is dropped. What no change touches comes out as
the same bytes. Peak memory: that of :func:`weft.calibrate.collect`, and one matrix in float32.

A run that is killed is begun again with the same call: it goes on behind the last finished block, and ends in the same bytes.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import weft
from weft.calibrate.check import check_architecture
from weft.calibrate.collectors import KINDS
from weft.calibrate.experts import unfused
from weft.calibrate.facts import Facts
from weft.calibrate.forward import digest_of
from weft.calibrate.parts import Part, Parts
from weft.calibrate.source import FromCheckpoint, InMemory
from weft.calibrate.statistics import Statistics
from weft.calibrate.task import BlockTask, Change, as_changes, check_data
from weft.calibrate.walker import Block, Walk
from weft.calibrate.watch import check_what
from weft.calibrate.watch_block import block_layers, results_of, watched
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.open import open_checkpoint
from weft.engine.checkpoint_writer import SHARD_BYTES, CheckpointWriter, check_target
from weft.engine.journal import WorkFolder
from weft.engine.memory import give_back
from weft.engine.progress import Progress
from weft.errors import CheckpointError, NonFiniteError, RecipeError, disk_errors
from weft.function.where import ALL_LINEAR, Selector, most_specific, nearest_names
from weft.packed import Packed


class Files(Protocol):
    """How packed weights are written."""

    def round(self, packed: Packed) -> Packed:
        """A packed weight as files will have it."""

    def block(self, block: Block, tasks: list[BlockTask]) -> Part:
        """Packed tensors that take the place of a block's matrices."""

    def finish(self, config: dict[str, Any], report: dict[str, Any]) -> Mapping[str, str]:
        """Given the output's ``config.json``, to change in place, and the report: texts of further files."""


def rewrite(
    model: Checkpoint | str | Path,
    batches: Iterable[Any] | None,
    change: Any,
    output: str | os.PathLike[str],
    *,
    what: str | Iterable[str] = (),
    where: Selector = "*",
    statistics: Statistics | str | os.PathLike[str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    seed: int = 0,
    skip_errors: bool = False,
    memory: int = 1 << 30,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    check: bool = True,
    autocast: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a changed copy of a transformers model, in its own types.

    Args:
        model: a folder, Hub id or open checkpoint.
        batches: calibration data; None for a change that needs none.
        change: given a layer's full name, its matrix (out, in) in float32 and the statistics of its block, returns the new
            matrix, or None to leave it; or a :class:`~weft.calibrate.Change`; or a mapping from selectors
            (:mod:`weft.function.where`) to these, of which the most specific decides. Fused experts come one by one; kernels
            of convolutions as (out, in · size).
        output: the folder.
        what: statistics to gather before a block is changed, beside those that a change needs: kinds of
            :data:`weft.calibrate.collectors.KINDS`.
        where: which layers of the blocks to change.
        statistics: of this model, gathered before (:func:`weft.calibrate.collect`), or their folder: instead of those that
            the changed blocks would give. Without ``batches`` nothing runs then.
        recipe: what is done, in words for ``weft.json``.
        seed: of what changes draw.
        skip_errors: leave a layer as it is where its change fails, and say so in ``weft.json``.
        memory: bytes of hidden states to keep in memory.
        shard_bytes: largest file.
        force: replace an output that weft made, and discard an unfinished run of something else.
        check: see :class:`weft.calibrate.Walk`.
        autocast: see :class:`weft.calibrate.Walk`; not done for changes that read the original model's hidden states.
        progress: where to report.

    Returns:
        The folder, with the model's configuration and tokenizer and a ``weft.json`` that lists what changed.

    Raises:
        RecipeError: no layer was chosen, a change returned another shape, or needs data and there is none.
        NonFiniteError: a change returned NaN or infinite values.
        CheckpointError: the model cannot be read or walked, or the statistics are of another one.
        OutputError: the output exists or cannot be written.
    """
    return write_blocks(
        model, batches, change, output, None, what=what, where=where, statistics=statistics, recipe=recipe, seed=seed,
        skip_errors=skip_errors, memory=memory, shard_bytes=shard_bytes, force=force, check=check, autocast=autocast,
        progress=progress,
    )  # fmt: skip


def write_blocks(
    model: Checkpoint | str | Path,
    batches: Iterable[Any] | None,
    change: Any,
    output: str | os.PathLike[str],
    files: Files | None,
    *,
    what: str | Iterable[str],
    where: Selector,
    statistics: Statistics | str | os.PathLike[str] | None,
    recipe: Mapping[str, Any] | None,
    seed: int,
    skip_errors: bool,
    memory: int,
    shard_bytes: int,
    force: bool,
    check: bool,
    autocast: bool,
    progress: Progress | None,
    timings: dict[str, float] | None = None,
) -> Path:
    """:func:`rewrite`, with packed weights in a format of their own where ``files`` are given.

    ``timings`` receives the seconds of each layer, which the output does not hold: it is the same bytes each time.
    """
    changes = as_changes(change)
    extra = check_what(what, list(KINDS)) if what else []
    held = Statistics.load(statistics) if isinstance(statistics, str | os.PathLike) else statistics
    data = None if batches is None else list(batches)
    check_data(changes, data, held, extra)
    checkpoint = open_checkpoint(model)
    progress = progress or Progress()
    target = Path(os.path.abspath(Path(output).expanduser()))
    work = WorkFolder(target)
    try:
        if held is not None:
            held.check(checkpoint)
        digest = None if data is None else digest_of(data)
        facts = {"model": checkpoint.name, "recipe": dict(recipe or {}), "data": digest, "seed": seed}
        configured = [(repr(s), repr(c)) for s, c in changes.items() if is_dataclass(c)]
        work.identity = identity = digest_of([
            weft.__version__, checkpoint.fingerprint, json.dumps(facts["recipe"], sort_keys=True, default=str), digest,
            repr(where), seed, None if held is None else held.facts.provenance, extra, configured, autocast,
        ])  # fmt: skip
        if work.tidy() == identity:  # this very run was killed when all was done
            return target
        check_target(checkpoint, target, force)
        work.acquire()
        try:
            parts = Parts(work.root / "parts", identity, force)
            seen: list[tuple[str, nn.Module]] = []  # for a hint, as long as nothing was chosen
            chosen = False
            walk_folder = None if data is None else work.root / "walk"
            targets = any(c.targets for c in changes.values())
            for block in _blocks(
                checkpoint, data, memory, check, autocast, progress, walk_folder, targets, parts, explicit(changes)
            ):
                part = _changed(block, changes, where, held, extra, seed, skip_errors, files, checkpoint)
                parts.put(block.number, part)
                chosen = chosen or bool(part.report)
                seen = [] if chosen else [*seen, *block.linears().items()]
                del part
                give_back()
                progress.advance(block.name or "embeddings and head", 1)
            report = parts.report()
            if not report:
                raise RecipeError(f"No layer was chosen by {where!r}.{nearest_names(where, seen)}")
            warn_of(report)
            config = dict(checkpoint.config)
            texts = dict(files.finish(config, report) if files else {})
            whole, changed_names = parts.assembled(checkpoint, config)
            if config != checkpoint.config:
                texts["config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            try:
                with CheckpointWriter(whole, target, force=force, shard_bytes=shard_bytes, work=work) as writer:
                    stable = {n: {k: v for k, v in notes.items() if k != "seconds"} for n, notes in report.items()}
                    said = {**facts, "changed": changed_names, "layers": stable, "blocks": parts.report("blocks")}
                    if timings is not None:
                        timings.update({n: notes["seconds"] for n, notes in report.items() if "seconds" in notes})
                    writer.publish({"weft": weft.__version__, **said}, texts)
            finally:
                own = {id(t.source) for t in checkpoint.tensors.values()}  # which the caller may go on with
                made = {id(t.source): t.source for t in whole.tensors.values() if id(t.source) not in own}
                for source in made.values():
                    source.close()
            return target
        except Exception as error:
            # a second try would fail as this did; with skip_errors it would not, where a result is not finite
            wrong = isinstance(error, RecipeError | CheckpointError) and not isinstance(error, NonFiniteError)
            if wrong or not any((work.root / "parts").glob("*.safetensors")):
                work.remove()
            elif isinstance(error, NonFiniteError) and not skip_errors:
                raise NonFiniteError(
                    f"{error} Finished blocks are kept: the same with skip_errors=True goes on behind them, with force=True it "
                    "begins anew."
                ) from error
            with disk_errors(work.root):
                raise
    finally:
        work.release()
        if checkpoint is not model:
            checkpoint.close()


def _changed(
    block: Block, changes: Mapping[Any, Change], where: Selector, held: Statistics | None, extra: list[str], seed: int,
    skip_errors: bool, files: Files | None, checkpoint: Checkpoint,
) -> Part:  # fmt: skip
    """Change a block, and say what of it is written; nothing of it stays in memory."""
    tasks = change_block(block, changes, where, held, extra, seed, skip_errors, files.round if files else None)
    changed = any(task.changed for task in tasks)
    part = files.block(block, tasks) if changed and files else Part()
    _add_dense(part, block.stored() if changed else {}, checkpoint)
    part.report = {name: task.notes.get(name, {}) for task in tasks for name in task.layers}
    part.blocks = {n: notes for task in tasks for n, notes in task.notes.items() if n not in part.report}
    return part


def warn_of(report: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn of layers that are not what was asked for."""
    for key, what in (
        ("few_rows", "changed without data, as too few rows of the data reached them:"),
        ("failed", "left as they are:"),
    ):
        names = [name for name, notes in report.items() if key in notes]
        if names:
            reason = f" ({report[names[0]][key]})" if key == "failed" else ". More data would help"
            warnings.warn(f"{len(names)} layers are {what} {', '.join(names[:5])}{reason}.", stacklevel=4)


def _add_dense(part: Part, tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """What a block's part lacks: tensors that changed and that nothing else takes the place of."""
    for name, tensor in tensors.items():
        if name in part.replaces:
            continue
        bits = _changed_tensor(tensor, checkpoint[name])
        if bits is not None:
            part.tensors[name] = bits
            part.replaces[name] = [name]


def change_block(
    block: Block, changes: Mapping[Any, Change], where: Selector, held: Statistics | None, extra: list[str], seed: int,
    skip_errors: bool, rounding: Callable[[Packed], Packed] | None = None,
) -> list[BlockTask]:  # fmt: skip
    """Let each change have its layers of a block, with statistics that are gathered before any of them begins."""
    every = block_layers(block, "*" if block.is_rest else where)
    known = list(explicit(changes) if block.is_rest else changes)
    mine: dict[Any, dict[str, nn.Module]] = {}
    for name, layer in every.items():
        selector = most_specific(known, name, layer)
        if selector is not None:
            mine.setdefault(selector, {})[name] = layer
    kinds = list(dict.fromkeys([*extra, *(k for s in mine for k in changes[s].needs)]))
    if mine and not skip_errors:
        _check_finite(block, {n: m for layers in mine.values() for n, m in layers.items()})
    statistics = held or Statistics({}, Facts())
    failed: dict[Any, str] = {}
    if kinds and held is None:
        needed = {n: m for s, layers in mine.items() for n, m in layers.items() if extra or changes[s].needs}
        try:
            statistics = _statistics_of(block, kinds, needed)
        except NonFiniteError as error:
            if not skip_errors:
                raise
            failed = {s: str(error) for s in mine if extra or changes[s].needs}
    tasks = []
    for selector, layers in mine.items():
        others = frozenset(n for other, names in mine.items() if other is not selector for n in names)
        task = BlockTask(block, layers, statistics, seed, skip_errors, rounding, others)
        tasks.append(task)
        if selector in failed:  # what the block is given is not finite
            for name, layer in layers.items():
                own = _is_finite(layer.weight)
                task.note(name, failed=failed[selector] if own else "its weights hold NaN or infinite values")
            continue
        changes[selector].change_block(task)
    return tasks


def _is_finite(tensor: Any) -> bool:
    return not tensor.is_floating_point() or all(bool(p.isfinite().all()) for p in tensor.detach().split(4096))


def _check_finite(block: Block, layers: Mapping[str, nn.Module]) -> None:
    """Refuse damaged weights by their names, before they spoil what is behind them."""
    found: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    if not block.is_rest:
        found |= {f"{block.name}.{n}": p for n, p in block.module.named_parameters()}
    for name, tensor in found.items():
        if not _is_finite(tensor):
            raise NonFiniteError(
                f"{name} holds NaN or infinite values. Repair the model, or leave such layers as they are with skip_errors=True."
            )


def explicit(changes: Mapping[Any, Change]) -> dict[Any, Change]:
    """Those that may choose layers outside of blocks: all but the ones for everything."""
    return {selector: c for selector, c in changes.items() if selector not in ("*", ALL_LINEAR)}


def _blocks(
    checkpoint: Checkpoint, batches: list[Any] | None, memory: int, check: bool, autocast: bool, progress: Progress,
    folder: Path | None, targets: bool, parts: Parts, beyond: Mapping[Any, Change],
) -> Iterator[Block]:  # fmt: skip
    """Blocks of a walk that no part is of, and the rest if a change may choose layers of it; without data, blocks that are
    only loaded.
    """
    if batches is not None:
        with Walk(
            checkpoint,
            batches,
            memory=memory,
            folder=folder,
            check=check,
            autocast=autocast and not targets,
            targets=targets,
        ) as walk:
            progress.start("changing", len(walk), len(walk), "blocks")
            done = 0
            for block in walk:
                for number in range(done, block.number):
                    progress.advance(f"block {number} of an earlier run", 1)
                done = block.number + 1
                yield block
            yield from rest_of(walk, beyond, parts)
        return
    source = FromCheckpoint(checkpoint)
    if check:
        check_architecture(type(source.model), source.model.config)
    names = [n for stack in source.stacks for n in stack]
    progress.start("changing", len(names), len(names), "blocks")
    for number, name in enumerate(names):
        if number in parts:
            progress.advance(f"block {number} of an earlier run", 1)
            continue
        source.load([name])
        module = source.model.get_submodule(name)
        with unfused(module, name) as experts:
            block = Block(name, number, module, Loaded(source), dict(experts))
            yield block
            block.experts.clear()  # their weights are views of what is dropped now
        source.drop([name])
    yield from rest_of(Loaded(source), beyond, parts)


def rest_of(walk: Walk, beyond: Mapping[Any, Change], done: Container[int] = ()) -> Iterator[Block]:
    """What lies outside of blocks, as a block, if a change may choose layers of it and it is not done."""
    chosen = [n for n, m in walk.source.rest_layers().items() if most_specific(list(beyond), n, m) is not None]
    if chosen and len(walk) not in done:
        with walk.rest() as block:
            yield block


class Loaded(Walk):
    """Stands for a walk where there is no data to walk with."""

    def __init__(self, source: InMemory):
        self.source, self.model = source, source.model
        self._names = [n for stack in source.stacks for n in stack]


def _statistics_of(block: Block, kinds: list[str], layers: Mapping[str, nn.Module]) -> Statistics:
    with watched(block, kinds, layers=layers) as watch:
        block.run(until=layers.values())
    facts = Facts()
    found = results_of(watch, layers, facts, fingerprints=False)
    return Statistics({name: t.float() if t.is_floating_point() else t for name, t in found}, facts)


def _changed_tensor(tensor: Tensor, stored: LazyTensor) -> Tensor | None:
    """A tensor as the file has its kind; None if it has not changed."""
    before = stored.torch()
    if before.shape != tensor.shape:
        raise CheckpointError(f"{stored.name}: was {list(before.shape)} and would be {list(tensor.shape)}.")
    if before.to(tensor.dtype).equal(tensor):
        return None  # a file in higher precision than the model runs in keeps it where nothing changed
    return tensor.detach().to(getattr(torch, stored.natural_dtype.torch)).contiguous()
