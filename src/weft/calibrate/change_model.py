"""Change a model in memory block by block: what :func:`weft.calibrate.rewrite` does on disk.

A model without a list of blocks is one block: statistics of all its layers are gathered before the first is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate.activations import Activations
from weft.calibrate.collectors import KINDS
from weft.calibrate.experts import unfused
from weft.calibrate.forward import call
from weft.calibrate.per_sample import evaluating
from weft.calibrate.rewrite import Loaded, change_block, explicit, rest_of, warn_of
from weft.calibrate.source import InMemory, find_blocks
from weft.calibrate.statistics import Statistics
from weft.calibrate.task import Change, as_changes, check_data
from weft.calibrate.walker import Block, Walk
from weft.calibrate.watch import check_what
from weft.engine.progress import Progress
from weft.errors import RecipeError
from weft.function.where import Selector, nearest_names
from weft.packed import Packed


@dataclass
class Changed:
    """What became of a model's layers.

    Attributes:
        packed: packed weights of layers that were given such.
        report: facts by layer.
    """

    packed: dict[str, Packed] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)


def change_model_(
    model: nn.Module,
    batches: Iterable[Any] | None,
    change: Any,
    *,
    what: str | Iterable[str] = (),
    where: Selector = "*",
    statistics: Statistics | str | Path | None = None,
    blocks: str | Sequence[str] = (),
    seed: int = 0,
    skip_errors: bool = False,
    memory: int = 1 << 30,
    autocast: bool = False,
    progress: Progress | None = None,
) -> Changed:
    """Change a model's layers in place; packed weights are dequantised into them.

    Args:
        model: any module; its lists of blocks are found, or named by ``blocks``.
        batches, change, what, where, statistics, seed, skip_errors, memory, autocast, progress: see :func:`weft.calibrate.rewrite`.
        blocks: see :class:`weft.calibrate.Walk`.

    Raises:
        RecipeError: no layer was chosen, a change returned another shape, or needs data and there is none.
        NonFiniteError: a change returned NaN or infinite values. Blocks before it stay changed.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> before = model[0].weight.detach().clone()
    >>> made = change_model_(model, None, lambda name, weight, statistics: 2 * weight, where="0")
    >>> torch.equal(model[0].weight, 2 * before), list(made.report)
    (True, ['0'])
    """
    changes = as_changes(change)
    extra = check_what(what, list(KINDS)) if what else []
    held = Statistics.load(statistics) if isinstance(statistics, str | Path) else statistics
    data = None if batches is None else list(batches)
    targets = any(c.targets for c in changes.values())
    check_data(changes, data, held, extra)
    if held is not None:
        held.check(model)
    progress = progress or Progress()
    made = Changed()
    seen: list[tuple[str, nn.Module]] = []
    for block in _blocks(model, data, blocks, memory, autocast and not targets, targets, progress, explicit(changes)):
        seen += block.linears().items()
        for task in change_block(block, changes, where, held, extra, seed, skip_errors):
            made.packed |= task.packed
            made.report |= {name: task.notes.get(name, {}) for name in task.layers}
        progress.advance(block.name or type(model).__name__, 1)
    if not made.report:
        raise RecipeError(f"No layer was chosen by {where!r}.{nearest_names(where, seen)}")
    warn_of(made.report)
    return made


def _blocks(
    model: nn.Module, data: list[Any] | None, blocks: str | Sequence[str], memory: int, autocast: bool, targets: bool, progress: Progress,
    beyond: Mapping[Any, Change],
) -> Iterator[Block]:  # fmt: skip
    try:
        names = [n for stack in find_blocks(model, blocks) for n in stack]
    except RecipeError:
        if blocks:
            raise
        names = []
    progress.start("changing", max(len(names), 1), max(len(names), 1), "blocks")
    if names and data is not None:
        with Walk(model, data, blocks=blocks, memory=memory, autocast=autocast, targets=targets) as walk:
            yield from walk
            yield from rest_of(walk, beyond)
        return
    for number, name in enumerate(names or [""]):
        module = model.get_submodule(name)
        with unfused(module, name) as experts, _Whole(model, module, data or [], memory, targets) as walk:
            yield Block(name, number, module, walk, dict(experts))
    if names:
        yield from rest_of(Loaded(InMemory(model, blocks)), beyond)


class _Whole(Walk):
    """Stands for a walk where the whole model is one block, or where there is no data to walk with."""

    def __init__(self, model: nn.Module, module: nn.Module, batches: list[Any], memory: int, targets: bool):
        self.source = InMemory.__new__(InMemory)
        self.source.model, self.source.stacks = model, [[""]]
        self.model, self.batches, self.batch_number = model, batches, 0
        self._original: Activations | None = Activations(memory) if targets else None
        self._evaluating: Any = None

    def __enter__(self) -> _Whole:
        self._evaluating = evaluating(self.model)
        self._evaluating.__enter__()
        if self._original is not None:
            with torch.no_grad():
                for number, batch in enumerate(self.batches):
                    self._original[number] = output_of(call(self.model, batch))
        return self

    def __exit__(self, *exc: object) -> None:
        self._evaluating.__exit__(*exc)
        if self._original is not None:
            self._original.close()

    def _arguments(self, block: Block, number: int, *, last: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.batch_number = number
        batch = self.batches[number]
        if isinstance(batch, Mapping):
            return (), dict(batch)
        return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}

    @torch.no_grad()
    def _replay(self, block: Block, keep: bool, until: tuple[nn.Module, ...]) -> None:
        for number in range(len(self.batches)):
            args, kwargs = self._arguments(block, number)
            block.module(*args, **kwargs)


def output_of(out: Any) -> Tensor:
    """The tensor that a model, or a block, returns: itself, the first of a tuple, or a model output's first value.

    Raises:
        RecipeError: there is none.

    >>> output_of((torch.ones(1), None))
    tensor([1.])
    """
    if isinstance(out, Mapping):
        out = next(iter(out.values()), None)
    if isinstance(out, tuple | list):
        out = out[0] if out else None
    if not isinstance(out, Tensor):
        raise RecipeError(f"A model that is calibrated returns tensors, this one returns {type(out).__name__}.")
    return out
