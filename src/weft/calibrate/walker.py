"""Go through a model block by block, with the weights of one block in memory.

    with Walk("model/", batches) as walk:
        for block in walk:                    # its weights are loaded
            with watch(block, …):             # hooks of statistics
                block.run()                   # its outputs from the calibration data
            …                                 # change its weights in place
        for output in walk.outputs(): …       # the model's own tail, from the last block's outputs

How it works. One forward pass for each batch runs the first block of a list and records what all the others are given:
each of them stands in for itself with a function that returns the hidden states of the first. Masks, rotary angles and
position biases differ from block to block in some models (sliding and full attention), so each block keeps its own; what
they share is stored once. Then every block runs over all batches, from the outputs of the block before it, and at the end
the stand-ins return the last hidden states, so that the model's own code computes its outputs. A model with several lists
(an encoder and a decoder) is walked list by list, as each needs the outputs of those before it.

That this reproduces the plain forward pass is checked once for each architecture, on a small copy with random weights
(:func:`weft.calibrate.check.check_architecture`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from weft.calibrate.activations import Activations, nested_map
from weft.calibrate.check import check_architecture
from weft.calibrate.experts import Slice, unfused
from weft.calibrate.source import FromCheckpoint, InMemory, open_source
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.errors import OutputError, RecipeError

Batch = Any  # a tensor, a tuple of positional arguments, or a mapping of named ones


class _Stop(Exception):
    """Everything that was to be recorded is."""


@dataclass
class Block:
    """One block of a model, with its weights loaded.

    Attributes:
        name: full name.
        number: place among all blocks of the model.
        module: the block itself.
        experts: linear layers over slices of fused experts, by full name.
    """

    name: str
    number: int
    module: nn.Module
    walk: Walk
    experts: dict[str, Slice] = field(default_factory=dict)
    finished: bool = field(default=False, init=False)

    def linears(self) -> dict[str, nn.Module]:
        """Layers that multiply by one matrix, by full name: linear layers, GPT-2's Conv1D, single experts."""
        from weft.function.where import is_linear

        found = {f"{self.name}.{p}": m for p, m in self.module.named_modules() if is_linear(m)}
        return {**found, **self.experts}

    def run(self, *, keep: bool = False) -> None:
        """Run over all batches, for hooks to see; ``keep``: outputs become the next block's inputs.

        The walk runs a block with ``keep`` by itself when the loop goes on, unless that was done; nothing may run after.

        Raises:
            RecipeError: the block ran with ``keep`` before, so its inputs are gone.
        """
        if self.finished:
            raise RecipeError(
                f"{self.name} has run with keep=True, and its inputs are gone; run it for statistics before that."
            )
        self.walk._replay(self, keep)
        self.finished = keep

    def given(self, batch: int) -> list[Tensor]:
        """Tensors that the block is given with a batch beside its hidden states (masks, angles, encoder states)."""
        found: list[Tensor] = []
        nested_map(self.walk._calls[self.name][batch], found.append)
        return found

    def stored(self) -> dict[str, Tensor]:
        """The present weights under the names that they have in a checkpoint."""
        return self.walk.source.stored(self.name)


class Walk:
    """A walk through the blocks of a model; use it in a ``with`` statement.

    Args:
        model: a folder, file or Hub id of a transformers model, an open checkpoint, or a model in memory.
        batches: calibration data; each a tensor, a tuple of positional or a mapping of named arguments.
        blocks: paths of the model's lists of blocks, where transformers does not say.
        model_class: of transformers, instead of the one that the configuration names.
        memory: bytes of hidden states to keep in memory; the rest goes to files.
        folder: where hidden states are kept after each block, so that a walk that was stopped goes on there.
        check: walk a small random copy first, and refuse an architecture where that differs from the plain forward pass.

    Raises:
        RecipeError: there are no batches, or no blocks.
        CheckpointError: the checkpoint is incomplete, or its architecture cannot be walked.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    >>> x = torch.randn(3, 4)
    >>> with Walk(model, [x], blocks="1") as walk:
    ...     names = [block.name for block in walk]
    ...     same = torch.equal(next(walk.outputs()), model(x))
    >>> names, same
    (['1.0', '1.1'], True)
    """

    def __init__(
        self,
        model: nn.Module | Checkpoint | str | Path | InMemory,
        batches: Iterable[Batch],
        *,
        blocks: str | Sequence[str] = (),
        model_class: Any = None,
        memory: int = 1 << 30,
        folder: str | os.PathLike[str] | None = None,
        check: bool = True,
    ):
        self.batches = [_on_cpu(b) for b in batches]
        if not self.batches:
            raise RecipeError(
                "There are no calibration batches: the data is empty, or its iterator was used up before."
            )
        self._opened = open_checkpoint(model) if isinstance(model, str | Path) else None  # ours to close
        try:
            self.source = (
                model if isinstance(model, InMemory) else open_source(self._opened or model, blocks, model_class)
            )
            self.model = self.source.model
            if check and isinstance(self.source, FromCheckpoint):
                check_architecture(type(self.model), self.model.config)
        except BaseException:
            self._close()
            raise
        self.batch_number = 0  # of the batch that a block is running on, for hooks
        self.folder = None if folder is None else Path(folder)
        self._memory = memory
        self._names = [n for stack in self.source.stacks for n in stack]
        self._calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._beside: dict[str, int | None] = {}  # how many values a block returns beside the hidden states
        self._current: Activations | None = None
        self._last: dict[int, Activations] = {}  # of finished lists
        self._first = 0  # the first block that is not finished
        self._caching: list[Any] = []  # configurations whose cache is off for the length of the walk
        self._training: list[nn.Module] = []  # modules that are in evaluation for the length of the walk
        self._known_identity = ""

    def __enter__(self) -> Walk:
        self._first = self._finished_before()
        self._caching = _without_cache(self.model)
        self._training = [m for m in self.model.modules() if m.training]
        for module in self._training:
            module.training = False
        return self

    def __exit__(self, *exc: object) -> None:
        for module in self._training:
            module.training = True
        self._close()
        for store in {id(s): s for s in [self._current, *self._last.values()] if s is not None}.values():
            store.close()
        self._calls.clear()
        for config in self._caching:
            config.use_cache = True

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Block]:
        number = 0
        for index, names in enumerate(self.source.stacks):
            if number + len(names) <= self._first:
                number += len(names)
                self._last[index] = self._reopen(number - 1)
                continue
            with torch.no_grad():
                self._capture(index)
            for name in names:
                if number < self._first:
                    if number == self._first - 1:
                        assert self._current is not None
                        self._current.close()
                        self._current = self._reopen(number)
                    number += 1
                    continue
                yield from self._visit(name, number)
                number += 1
            assert self._current is not None
            self._last[index] = self._current
        self._calls.clear()

    @torch.no_grad()
    def outputs(self) -> Iterator[Any]:
        """The model's outputs for each batch, from the last hidden states, by the model's own code after the blocks.

        Raises:
            RecipeError: the walk is not finished.
        """
        if len(self._last) < len(self.source.stacks):
            raise RecipeError("The walk is not finished: go through all its blocks first.")
        self.source.load_rest()
        try:
            for number, batch in enumerate(self.batches):
                with self._standing_in(len(self.source.stacks), number, {}):
                    yield call(self.model, batch)
        finally:
            self.source.drop_rest()

    def _visit(self, name: str, number: int) -> Iterator[Block]:
        self.source.load([name])
        module = self.model.get_submodule(name)
        try:
            with unfused(module, name) as experts:
                block = Block(name, number, module, self, dict(experts))
                yield block
                if not block.finished:
                    block.run(keep=True)
            self._finish(number)
        finally:
            self.source.drop([name])

    @torch.no_grad()
    def _replay(self, block: Block, keep: bool) -> None:
        assert self._current is not None
        written = self._store(block.number) if keep else None
        for number, (args, kwargs) in enumerate(self._calls[block.name]):
            self.batch_number = number
            hidden = self._current[number]
            args, kwargs = _with_hidden(args, kwargs, hidden)
            out = block.module(*args, **kwargs)
            if written is not None:
                written[number] = _hidden_of(out, block.name)
        if written is not None:
            self._current.close()
            self._current = written

    def _capture(self, index: int) -> None:
        """Record what each block of a list is given, and the hidden states that enter its first."""
        names = self.source.stacks[index]
        self._calls = {name: [] for name in names}
        self._current = self._store(-1)
        self.source.load_rest()
        self.source.load(names[:1])
        for number, batch in enumerate(self.batches):
            shared: dict[int, Tensor] = {}
            with self._standing_in(index, number, shared), contextlib.suppress(_Stop):
                call(self.model, batch)
            for name in names:
                if len(self._calls[name]) != number + 1:
                    raise RecipeError(
                        f"{name} ran {len(self._calls[name]) - number} times in the forward pass of batch {number}, not once; "
                        "a walk needs lists of blocks that run one after another."
                    )
        self.source.drop(names[:1])
        self.source.drop_rest()

    def _standing_in(self, index: int, number: int, shared: dict[int, Tensor]) -> _StandIns:
        """Blocks replaced: those of lists before ``index`` return their last outputs, those of ``index`` record."""
        forwards: dict[str, Callable[..., Any]] = {}
        for before in range(index):
            for name in self.source.stacks[before]:
                forwards[name] = self._returning(self._last[before], number, name)
        if index < len(self.source.stacks):
            names = self.source.stacks[index]
            beside: list[Any] = []
            for name in names:
                forwards[name] = self._recording(name, name == names[0], name == names[-1], number, beside, shared)
        return _StandIns(self.model, forwards)

    def _returning(self, last: Activations, number: int, name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, beside = last[number], self._beside[name]
            return hidden if beside is None else (hidden, *([None] * beside))

        return forward

    def _recording(
        self, name: str, first: bool, last: bool, number: int, beside: list[Any], shared: dict[int, Tensor]
    ) -> Callable[..., Any]:
        module = self.model.get_submodule(name)
        plain = module.forward

        def once(tensor: Tensor) -> Tensor:
            return shared.setdefault(id(tensor), tensor)

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor):
                raise RecipeError(f"{name} is not given hidden states first; it cannot be walked.")
            bare = _with_hidden(args, kwargs, None)
            self._calls[name].append(nested_map(bare, once))
            if first:
                assert self._current is not None
                self._current[number] = hidden.clone()  # the block may change it in place
                out = plain(*args, **kwargs)
                beside.append(out[1:] if isinstance(out, tuple) else None)
            self._beside[name] = None if beside[0] is None else len(beside[0])
            if last:
                raise _Stop
            return hidden if beside[0] is None else (hidden, *beside[0])

        return forward

    def _store(self, number: int) -> Activations:
        keep = self.folder is not None and number >= 0
        folder = self.folder / f"block-{number:04d}" if keep and self.folder is not None else None
        return Activations(self._memory // 2, folder, keep=keep)

    def _reopen(self, number: int) -> Activations:
        store = self._store(number)
        store.reopen(len(self.batches))
        return store

    def _finish(self, number: int) -> None:
        """Note that a block is finished; hidden states before it go, unless a later list needs them."""
        if self.folder is None:
            return
        self._write_journal(number + 1)
        ends, end = set(), -1
        for stack in self.source.stacks:
            end += len(stack)
            ends.add(end)
        if number - 1 not in ends and number > 0:
            store = Activations(0, self.folder / f"block-{number - 1:04d}")
            store.close()

    def _write_journal(self, finished: int) -> None:
        assert self.folder is not None
        path = self.folder / "walk.json"
        partial = path.with_suffix(".partial")
        journal = {"identity": self._known_identity, "finished": finished, "beside": self._beside}
        partial.write_text(json.dumps(journal), encoding="utf-8")
        os.replace(partial, path)

    def _finished_before(self) -> int:
        if self.folder is None:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._known_identity = self._identity()
        path = self.folder / "walk.json"
        if not path.is_file():
            return 0
        try:
            journal = json.loads(path.read_text(encoding="utf-8"))
            identity, finished, beside = journal["identity"], int(journal["finished"]), dict(journal["beside"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise OutputError(
                f"{path}: is no record of a walk ({error!r}). Give another folder, or remove this one."
            ) from None
        if identity != self._known_identity or not 0 <= finished <= len(self._names):
            raise OutputError(
                f"{self.folder}: holds the walk of another model or other data. Give another folder, or remove this one."
            )
        self._beside = beside
        return finished

    def _identity(self) -> str:
        """Of the model's weights, its blocks, and the batches."""
        return digest_of([self.source.weights_identity(), self._names, *self.batches])


def digest_of(value: Any) -> str:
    """A digest of a nest of tensors and plain values: of their bytes, shapes and types, and of the names in mappings.

    >>> digest_of([torch.zeros(2, 3)]) == digest_of([torch.zeros(3, 2)])
    False
    """
    digest = xxhash.xxh3_128()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            digest.update(f"mapping of {len(part)}".encode())
            for key, inner in part.items():
                digest.update(repr(key).encode())
                add(inner)
        elif isinstance(part, list | tuple):
            digest.update(f"sequence of {len(part)}".encode())
            for inner in part:
                add(inner)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


class _StandIns:
    """For the length of a ``with``: other forward functions for some modules."""

    def __init__(self, model: nn.Module, forwards: Mapping[str, Callable[..., Any]]):
        self._modules = {name: model.get_submodule(name) for name in forwards}
        self._forwards = forwards
        self._before: dict[str, Any] = {}  # forward functions that others have put on single modules

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            if "forward" in module.__dict__:
                self._before[name] = module.__dict__["forward"]
            module.__dict__["forward"] = self._forwards[name]

    def __exit__(self, *exc: object) -> None:
        for name, module in self._modules.items():
            module.__dict__.pop("forward", None)
            if name in self._before:
                module.__dict__["forward"] = self._before[name]


def _without_cache(model: nn.Module) -> list[Any]:
    """Configurations whose cache was on and is off now: a block would see its own keys again in its second run."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    found = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in found:
        config.use_cache = False
    return found


def call(model: nn.Module, batch: Batch) -> Any:
    """A model's outputs for a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _hidden_of(out: Any, name: str) -> Tensor:
    hidden = out[0] if isinstance(out, tuple) else out
    if not isinstance(hidden, Tensor):
        raise RecipeError(f"{name} returns {type(hidden).__name__} and not hidden states; it cannot be walked.")
    return hidden


def _on_cpu(batch: Batch) -> Batch:
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return nested_map(batch, lambda tensor: tensor.detach().cpu())
