"""What changes the layers of a block, and what it is given to do so.

    class Doubled(Change):
        def fit(self, name, weight, statistics):     # one layer: its matrix (out, in) in float32
            return 2 * weight

A change that looks at layers one by one says what becomes of each: a matrix, a packed weight, or None to leave it. One that
looks at a whole block overrides :meth:`Change.change_block`, which has the block itself, what it is called with, and what
the original model has after it.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from weft.calibrate.statistics import Statistics
from weft.calibrate.walker import Block
from weft.errors import NonFiniteError, RecipeError, WeftError
from weft.function.layout import Layout, layout_of
from weft.packed import Packed, Transposed

SEEN = 256  # outputs, at least, by which a layer's error is judged
FEW = 16  # rows of inputs below which statistics say too little about a layer
Result: TypeAlias = Tensor | Packed | None


class Change:
    """Changes the layers of a block; the base of configurations that do.

    Attributes:
        needs: kinds of statistics that it reads (:data:`weft.calibrate.collectors.KINDS`).
        targets: whether it reads the original model's hidden states, :meth:`weft.calibrate.Block.target`.
        file_format: the format of files that says the packed weights that it makes (:mod:`weft.packed.formats`).
    """

    needs: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[bool] = False
    file_format: ClassVar[str] = "weft"

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Result:
        """What becomes of one layer. Not abstract: what overrides :meth:`change_block` may have no use for it.

        Args:
            name: the layer's full name.
            weight: (out, in) float32; kernels of convolutions as (out, in · size).
            statistics: of its inputs, what :attr:`needs` says.

        Returns:
            The matrix, or a packed one, or None to leave the layer.
        """
        raise NotImplementedError

    def without_data(self) -> Change | None:
        """What is done to a layer that too few rows of inputs reached; None: the same."""
        return None

    def runs_blocks(self) -> bool:
        """Whether blocks are run over data while they are changed, so that statistics alone do not do."""
        return self.targets

    def scratch(self, rows: int, columns: int) -> float:
        """Bytes that changing one layer takes beside the model and the statistics: copies in float32, codes, packing."""
        return 32.0 * rows * columns

    def nominal_bits(self, rows: int, columns: int) -> float:
        """Bits a weight in files, about; 0 where it is not known beforehand."""
        return 0.0

    def change_block(self, task: BlockTask) -> None:
        """Change the layers of a task."""
        for name in task.layers:
            with task.attempt(name):
                change = task.instead(name, self)
                task.put(name, change.fit(name, task.weight(name), task.statistics))


class EachLayer(Change):
    """A function of name, matrix and statistics as a :class:`Change`."""

    def __init__(self, function: Callable[[str, Tensor, Statistics], Result]):
        self.function = function

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Result:
        return self.function(name, weight, statistics)


@dataclass
class BlockTask:
    """Layers of one block that a change is to change.

    Attributes:
        block: the block, with its weights loaded and its inputs at hand.
        layers: those to change, by full name: linear ones, convolutions, single experts.
        statistics: of their inputs, with the weights that the blocks before have now.
        seed: of what is drawn; see :meth:`generator`.
        skip_errors: leave a layer as it is where its change fails, and note the reason.
        round: what files will make of a packed weight (scales in their type), done to every one that is put.
        elsewhere: layers of the block that other changes have.
        packed: what was put, of the layers that were given packed weights.
        changed: layers that were put.
        notes: facts for the report, by layer.
    """

    block: Block
    layers: dict[str, nn.Module]
    statistics: Statistics
    seed: int = 0
    skip_errors: bool = False
    round: Callable[[Packed], Packed] | None = None
    elsewhere: frozenset[str] = frozenset()
    packed: dict[str, Packed] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """A layer's present matrix (out, in), a copy in float32."""
        return _matrix(self.layers[name]).to(torch.float32, copy=True)

    @torch.no_grad()
    def put(self, name: str, value: Result) -> None:
        """Give a layer a new matrix: (out, in), or packed; None leaves it.

        The report learns how far it moved: ‖Δ‖ / ‖W‖, and, where the Gram matrix G of its inputs is known, the share of its
        output that changed, tr(Δ G Δᵀ) / tr(W G Wᵀ); of many rows, over some hundreds of them.

        Raises:
            RecipeError: it has another shape.
            NonFiniteError: it holds NaN or infinite values, in the layer's type.
        """
        if value is None:
            return
        layer: Any = self.layers[name]
        before = self.weight(name)
        if isinstance(value, Packed) and self.round is not None:
            value = self.round(value)
        new = value.dequantize() if isinstance(value, Packed) else value
        if new.shape != before.shape:
            raise RecipeError(
                f"{name}: a change must keep the shape {list(before.shape)}, it returned {list(new.shape)}."
            )
        new = new.to(layer.weight.dtype)
        if not new.isfinite().all():
            raise NonFiniteError(f"{name}: the changed weight holds NaN or infinite values as {layer.weight.dtype}.")
        layout = layout_of(layer, "weight", layer.weight)
        layer.weight.copy_(layout.stored(new.reshape(layout.seen(layer.weight).shape)))
        self.changed.append(name)
        self.note(name, **self._moved(name, before, new.float()))
        if isinstance(value, Packed):
            self.packed[name] = value
            self.note(name, form=value.settings()["form"], bits=value.bits_per_weight)

    def note(self, name: str, **facts: Any) -> None:
        """Add facts about a layer, or the block, to the report; JSON values."""
        self.notes.setdefault(name, {}).update(facts)

    def few(self, name: str) -> bool:
        """Whether too few rows of data reached a layer for its statistics to say much."""
        return bool(self.statistics.facts.layers) and self.statistics.rows(name) < FEW

    def instead(self, name: str, change: Change) -> Change:
        """The change itself, or what it does without data where too few rows reached the layer, which is noted."""
        other = change.without_data() if change.needs and self.few(name) else None
        if other is None:
            return change
        self.note(name, few_rows=self.statistics.rows(name))
        return other

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Around the change of a layer: with ``skip_errors``, what fails is noted and the layer stays; the time is noted."""
        start = time.perf_counter()
        try:
            yield
        except (WeftError, torch.linalg.LinAlgError) as error:
            if not self.skip_errors:
                if isinstance(error, WeftError) and name not in str(error):
                    raise type(error)(f"{name}: {error}") from error
                raise
            self.note(name, failed=str(error))
        self.note(name, seconds=round(time.perf_counter() - start, 3))

    def generator(self, name: str = "") -> torch.Generator:
        """Random numbers of this block, or of one of its layers: the same whatever came before."""
        key = zlib.crc32((name or self.block.name).encode())
        return torch.Generator().manual_seed((self.seed << 32) ^ key)

    def _moved(self, name: str, before: Tensor, after: Tensor) -> dict[str, float]:
        delta = after - before
        norm = float(before.norm())
        found = {"error": float(delta.norm()) / norm if norm else 0.0}
        rms = norm / math.sqrt(before.numel())
        found["outlier"] = float(before.abs().max()) / rms if rms else 0.0
        if not self.statistics.has(name, "gram"):
            return found
        gram = self.statistics.gram(name).float()
        if gram.dim() == 2:
            rows = torch.arange(0, len(before), max(1, len(before) // SEEN))
            before, delta = before[rows], delta[rows]
            whole = float(((before @ gram) * before).sum())
            found["output_error"] = float(((delta @ gram) * delta).sum()) / whole if whole > 0 else 0.0
        return found


def _matrix(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    return layout_of(layer, "weight", weight).seen(weight).flatten(1)


def as_stored(layer: nn.Module, value: Packed) -> Packed:
    """A packed matrix (out, in) in the order in which the layer's tensor lies in a checkpoint."""
    weight: Any = layer.weight
    layout: Layout = layout_of(layer, "weight", weight)
    return Transposed(value) if layout.transposed else value


def check_data(changes: Mapping[Any, Change], data: object, statistics: object, extra: Iterable[str] = ()) -> None:
    """Whether there is what changes need: batches, or statistics where these do.

    Raises:
        RecipeError: data is missing.
    """
    if data is not None:
        return
    runs = [type(c).__name__ for c in changes.values() if c.runs_blocks()]
    if runs:
        raise RecipeError(
            f"{runs[0]} runs blocks over calibration data, and there is none; statistics alone do not do. Give batches."
        )
    kinds = dict.fromkeys([*extra, *(k for c in changes.values() if statistics is None for k in c.needs)])
    if kinds:
        raise RecipeError(
            f"{', '.join(kinds)} are statistics of data, and there is none; give batches{'' if extra else ', or statistics'}."
        )


def as_changes(change: Any) -> dict[Any, Change]:
    """What a user gives as a change: a function, a :class:`Change`, or one of these for each selector.

    Raises:
        RecipeError: it is none of these.
    """
    given = change if isinstance(change, Mapping) else {"*": change}
    made: dict[Any, Change] = {}
    for selector, one in given.items():
        if not isinstance(one, Change) and (isinstance(one, type) or not callable(one)):
            raise RecipeError(
                f"{one!r} changes no layers; give a configuration such as weft.quantize.RTN(), or a function."
            )
        made[selector] = one if isinstance(one, Change) else EachLayer(one)
    if not made:
        raise RecipeError("There is nothing to do: the mapping from layers to changes is empty.")
    return made
