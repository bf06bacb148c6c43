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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate.activations import Activations, nested_map
from weft.calibrate.check import check_architecture
from weft.calibrate.experts import Slice, unfused
from weft.calibrate.forward import (
    Batch,
    StandIns,
    call,
    digest_of,
    has_bfloat16,
    hidden_of,
    on_cpu,
    with_hidden,
    without_cache,
)  # fmt: skip
from weft.calibrate.source import FromCheckpoint, InMemory, open_source
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.errors import OutputError, RecipeError, WeftError, disk_error

_ORIGINAL = "original-"  # folders of the original model's hidden states


@contextlib.contextmanager
def _told(model: nn.Module, number: int) -> Iterator[None]:
    """Around a model's own code before its first block: what is wrong with a batch, in words."""
    try:
        yield
    except (IndexError, TypeError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, WeftError) or "memory" in str(error):
            raise
        raise RecipeError(
            f"{type(model).__name__} cannot be called with batch {number} ({str(error).splitlines()[0]}). A batch is a tensor, a "
            "tuple of positional or a mapping of named arguments; token ids lie within the model's vocabulary, and rows within its "
            "positions."
        ) from error


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
        own: its layers by full name, where they are not simply those inside of the module.
    """

    name: str
    number: int
    module: nn.Module
    walk: Walk
    experts: dict[str, Slice] = field(default_factory=dict)
    own: dict[str, nn.Module] | None = None
    finished: bool = field(default=False, init=False)

    @property
    def is_rest(self) -> bool:
        """Whether it stands for all that lies outside of blocks: :meth:`Walk.rest`."""
        return self.own is not None

    def linears(self) -> dict[str, nn.Module]:
        """Layers that multiply by one matrix, by full name: linear layers, GPT-2's Conv1D, single experts."""
        from weft.function.where import is_linear

        if self.own is not None:
            return self.own
        found = {".".join(x for x in (self.name, p) if x): m for p, m in self.module.named_modules() if is_linear(m)}
        return {**found, **self.experts}

    def run(self, *, keep: bool = False, until: Iterable[nn.Module] = ()) -> None:
        """Run over all batches, for hooks to see; ``keep``: outputs become the next block's inputs.

        The walk runs a block with ``keep`` by itself when the loop goes on, unless that was done; nothing may run after.
        ``until``: layers whose inputs are all that is wanted; where each runs once, the block stops when all are given theirs.

        Raises:
            RecipeError: the block ran with ``keep`` before, so its inputs are gone.
        """
        if self.finished:
            raise RecipeError(
                f"{self.name} has run with keep=True, and its inputs are gone; run it for statistics before that."
            )
        self.walk._replay(self, keep, () if keep else tuple(until))
        self.finished = keep

    def batch(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the block is called with for a batch: its arguments, hidden states among them.

        Raises:
            RecipeError: the block ran with ``keep`` before, so its inputs are gone.
        """
        return self.walk._arguments(self, number)

    def target(self, number: int) -> Tensor:
        """The hidden states that the original model has after this block, for a batch.

        Raises:
            RecipeError: the walk does not keep them (``targets=True``).
        """
        return self.walk._target(number)

    def given(self, batch: int) -> list[Tensor]:
        """Tensors that the block is given with a batch beside its hidden states (masks, angles, encoder states)."""
        found: list[Tensor] = []
        nested_map(self.walk._calls[self.name][batch], found.append)
        return found

    def stored(self) -> dict[str, Tensor]:
        """The present weights under the names that they have in a checkpoint."""
        return self.walk.source.stored_rest() if self.is_rest else self.walk.source.stored(self.name)


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
        autocast: run the blocks of models in float32 and float16 with products in bfloat16 (``torch.autocast``), where the
            processor has instructions for that: several times faster, and as exact as a model in bfloat16 is.
        targets: run each block over the original model's hidden states too, before it is yielded: :meth:`Block.target`.
            Hidden states are kept twice then.

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
        autocast: bool = False,
        targets: bool = False,
    ):
        self.targets = targets
        self.batches = [on_cpu(b) for b in batches]
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
        self.autocast = autocast and has_bfloat16() and _dtype_of(self.model) in (torch.float32, torch.float16)
        self.batch_number = 0  # of the batch that a block is running on, for hooks
        self.folder = None if folder is None else Path(folder)
        self._memory = memory
        self._names = [n for stack in self.source.stacks for n in stack]
        self._calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._beside: dict[str, int | None] = {}  # how many values a block returns beside the hidden states
        self._current: Activations | None = None
        self._last: dict[int, Activations] = {}  # of finished lists
        self._original: Activations | None = None  # the original model's hidden states after the current block
        self._first = 0  # the first block that is not finished
        self._caching: list[Any] = []  # configurations whose cache is off for the length of the walk
        self._training: list[nn.Module] = []  # modules that are in evaluation for the length of the walk
        self._known_identity = ""

    def __enter__(self) -> Walk:
        self._first = self._finished_before()
        self._caching = without_cache(self.model)
        self._training = [m for m in self.model.modules() if m.training]
        for module in self._training:
            module.training = False
        return self

    def __exit__(self, *exc: object) -> None:
        for module in self._training:
            module.training = True
        self._close()
        every = [self._current, self._original, *self._last.values()]
        for store in {id(s): s for s in every if s is not None}.values():
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
            self._original = None
            for name in names:
                if number < self._first:
                    if number == self._first - 1:
                        assert self._current is not None
                        self._current.close()
                        self._current = self._reopen(number)
                        self._original = self._reopen(number, original=True) if self.targets else None
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
                with self._standing_in(len(self.source.stacks), number, {}), self._computing():
                    out = call(self.model, batch)
                yield out
        finally:
            self.source.drop_rest()

    @contextlib.contextmanager
    def rest(self) -> Iterator[Block]:
        """What lies outside of blocks, with its weights loaded, as a block: embeddings and linear layers.

        When it runs, the model's own code after the blocks does, from the last hidden states.
        """
        self.source.load_rest()
        try:
            yield Block("", len(self._names), self.model, self, own=self.source.rest_layers())
        finally:
            self.source.drop_rest()

    def _visit(self, name: str, number: int) -> Iterator[Block]:
        self.source.load([name])
        module = self.model.get_submodule(name)
        try:
            with unfused(module, name) as experts:
                block = Block(name, number, module, self, dict(experts))
                if self.targets:
                    self._run_original(block)
                yield block
                if not block.finished:
                    block.run(keep=True)
                block.experts.clear()  # their weights are views of what is dropped now
            self._finish(number)
        finally:
            self.source.drop([name])

    def _arguments(self, block: Block, number: int, *, last: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if block.finished or self._current is None:
            raise RecipeError(
                f"{block.name} has run with keep=True, and its inputs are gone; ask for them before that."
            )
        self.batch_number = number
        hidden = self._current.take(number) if last else self._current[number]
        return with_hidden(*self._calls[block.name][number], hidden)

    def _target(self, number: int) -> Tensor:
        if self._original is None:
            raise RecipeError("The walk does not keep the original model's hidden states; walk with targets=True.")
        return self._original[number]

    @torch.no_grad()
    def _run_original(self, block: Block) -> None:
        """The block as it was, over what the original model gives it."""
        before = self._original or self._current
        assert before is not None
        written = self._store(block.number, original=True)
        mine = self._original is not None  # and nothing else reads what the original model had before
        for number, call_ in enumerate(self._calls[block.name]):
            args, kwargs = with_hidden(*call_, before.take(number) if mine else before[number])
            with self._computing():
                written[number] = hidden_of(block.module(*args, **kwargs), block.name)
        if self._original is not None:
            self._original.close()
        self._original = written

    @torch.no_grad()
    def _replay(self, block: Block, keep: bool, until: tuple[nn.Module, ...]) -> None:
        if block.is_rest:
            for number, batch in enumerate(self.batches):
                self.batch_number = number
                with self._standing_in(len(self.source.stacks), number, {}), self._computing():
                    call(self.model, batch)
            return
        assert self._current is not None
        written = self._store(block.number) if keep else None
        with _Enough(until) as enough, self._computing():  # around all batches: weights are rounded once
            for number in range(len(self._calls[block.name])):
                args, kwargs = self._arguments(block, number, last=keep)
                with enough.next():
                    out = block.module(*args, **kwargs)
                del args, kwargs
                if written is not None:
                    written[number] = self._typed(hidden_of(out, block.name))
        if written is not None:
            self._current.close()
            self._current = written

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()

    def _typed(self, hidden: Tensor) -> Tensor:
        """In the model's type, where autocast has given others."""
        return hidden.to(_dtype_of(self.model)) if self.autocast else hidden

    def _capture(self, index: int) -> None:
        """Record what each block of a list is given, and the hidden states that enter its first."""
        names = self.source.stacks[index]
        self._calls = {name: [] for name in names}
        self._current = self._store(-1)
        self.source.load_rest()
        self.source.load(names[:1])
        for number, batch in enumerate(self.batches):
            shared: dict[int, Tensor] = {}
            with (
                self._standing_in(index, number, shared), contextlib.suppress(_Stop), _told(self.model, number),
                self._computing(),
            ):  # fmt: skip
                call(self.model, batch)
            for name in names:
                if len(self._calls[name]) != number + 1:
                    raise RecipeError(
                        f"{name} ran {len(self._calls[name]) - number} times in the forward pass of batch {number}, not once; "
                        "a walk needs lists of blocks that run one after another."
                    )
        self.source.drop(names[:1])
        self.source.drop_rest()

    def _standing_in(self, index: int, number: int, shared: dict[int, Tensor]) -> StandIns:
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
        return StandIns(self.model, forwards)

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
            bare = with_hidden(args, kwargs, None)
            self._calls[name].append(nested_map(bare, once))
            if first:
                assert self._current is not None
                self._current[number] = hidden.clone()  # the block may change it in place
                if number == 0 or self._beside[name] is not None:
                    out = plain(*args, **kwargs)
                    beside.append(out[1:] if isinstance(out, tuple) else None)
                else:  # nothing that it returns is looked at
                    beside.append(None)
            self._beside[name] = None if beside[0] is None else len(beside[0])
            if last:
                raise _Stop
            return hidden if beside[0] is None else (hidden, *beside[0])

        return forward

    def _store(self, number: int, original: bool = False) -> Activations:
        keep = self.folder is not None and number >= 0
        folder = self.folder / f"{_ORIGINAL * original}block-{number:04d}" if keep and self.folder is not None else None
        # a block's inputs are given up as its outputs come
        return Activations(self._memory // (2 if self.targets else 1), folder, keep=keep)

    def _reopen(self, number: int, original: bool = False) -> Activations:
        store = self._store(number, original)
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
        if number > 0:
            Activations(0, self.folder / f"{_ORIGINAL}block-{number - 1:04d}").close()
        if number - 1 not in ends and number > 0:
            Activations(0, self.folder / f"block-{number - 1:04d}").close()

    def _write_journal(self, finished: int) -> None:
        assert self.folder is not None
        path = self.folder / "walk.json"
        partial = path.with_suffix(".partial")
        journal = {"identity": self._known_identity, "finished": finished, "beside": self._beside}
        try:
            with open(partial, "w", encoding="utf-8") as file:
                json.dump(journal, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise disk_error(path, error) from None

    def _finished_before(self) -> int:
        if self.folder is None:
            return 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.folder, error) from None
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
        return digest_of([self.source.weights_identity(), self._names, self.targets, self.autocast, *self.batches])


class _Enough:
    """Ends forward passes when some layers have all been given their inputs, if each of them runs once in a pass."""

    def __init__(self, layers: tuple[nn.Module, ...]):
        self._layers = layers
        self._runs: dict[int, int] = {}  # in this pass, by the layer's place
        self._once = False
        self._handles: list[Any] = []

    def __enter__(self) -> _Enough:
        self._handles = [m.register_forward_pre_hook(self._counting(i)) for i, m in enumerate(self._layers)]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def next(self) -> Iterator[None]:
        """Around a pass; the first one runs to its end."""
        self._runs = {}
        with contextlib.suppress(_Stop):
            yield
            self._once = list(self._runs.values()) == [1] * len(self._layers)

    def _counting(self, place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._runs[place] = self._runs.get(place, 0) + 1
            if self._once and len(self._runs) == len(self._layers):
                raise _Stop

        return hook


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
