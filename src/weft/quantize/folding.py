"""Which tensors of a block can carry the inverse of what a layer's input channels are multiplied by.

    x (tokens, in) = P(z) · diag(1/s),   W' = W · diag(s)        y = x W'ᵀ as before, if all that reads P's output does so

P, the producer, is a norm (its weight and bias are divided by s, or 1 + weight where that is what it multiplies by), or some
rows of a linear layer: value rows for the layer behind attention, up for down, fc1 for fc2 where a ReLU stands between them.
With s of P's channels, a reader's input channel j is a multiple of channel source[j]: the identity, or, where several query
heads read one value head, many to one.

Nothing here knows a name or an architecture. A producer is divided by random numbers, and the inputs of all layers are
compared with what they were: a reader is a layer whose input channels are divided by exactly these. Then the readers'
columns are multiplied by them, and the fold is taken if the block's output is what it was. So post-norm residuals, clamps,
biases and activations that a scale does not pass are found out, and such a fold is refused with a reason.

Complexity: two forward passes of one batch for each producer tried, about twenty for a decoder's block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate import Block, BlockTask
from weft.calibrate.experts import Slice
from weft.quantize.probe import Edit, Run, edited, matrix_of, run_block, write

TOLERANCE = 1e-5  # of the block's output, relative, in float32
LEAKS = 1e-2  # share of what an uncompensated scale does that a compensated one may do
EXPONENTS = 2  # random scales are powers of two, from 2^-2 to 2^2: products are the same to the last bit


@dataclass(frozen=True)
class Reader:
    """A layer whose input channels are a producer's output.

    Attributes:
        name: full name.
        module: with a matrix (out, in).
        source: (in,) int64, which channel of the producer each input channel is a multiple of.
    """

    name: str
    module: nn.Module
    source: Tensor


@dataclass(frozen=True)
class Fold:
    """A producer and all that reads it.

    Attributes:
        name: of the producer.
        module: the producer.
        kind: norm (multiplies by its weight), offset (by 1 + its weight), or linear.
        rows: first and last + 1 of its channels that are scaled; all of a norm's.
        readers: layers whose columns are multiplied.
    """

    name: str
    module: nn.Module
    kind: str
    rows: tuple[int, int]
    readers: tuple[Reader, ...]

    @property
    def channels(self) -> int:
        """How many scales there are."""
        return self.rows[1] - self.rows[0]

    def divided(self, scale: Tensor) -> list[Edit]:
        """The producer's tensors divided by scales (channels,)."""
        start, stop = self.rows
        module: Any = self.module
        bias = getattr(module, "bias", None)
        if self.kind == "linear":
            weight = matrix_of(module)[start:stop]
            edits = [(weight, weight / scale[:, None])]
        else:
            weight = module.weight.detach()
            edits = [(weight, (1 + weight) / scale - 1 if self.kind == "offset" else weight / scale)]
        if isinstance(bias, Tensor):
            part = bias.detach()[start:stop]
            edits.append((part, part / scale))
        return edits

    def multiplied(self, scale: Tensor) -> list[Edit]:
        """The readers' matrices with columns multiplied by scales (channels,)."""
        weights = [(matrix_of(r.module), scale[r.source]) for r in self.readers]
        return [(weight, weight * columns) for weight, columns in weights]

    @torch.no_grad()
    def apply(self, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fold scales in.

        Args:
            scale: (channels,), positive.
            dtype: that the producer will be rounded to. A norm's readers are multiplied by what is left of the scale then;
                a channel that would overflow keeps a scale of one.

        Returns:
            The scales (channels,) that readers were multiplied by.
        """
        fits = torch.ones_like(scale, dtype=torch.bool)
        for _, new in self.divided(scale):
            fits &= new.reshape(self.channels, -1).abs().amax(1) <= torch.finfo(dtype).max
        scale = torch.where(fits, scale, 1.0)
        edits = self.divided(scale)
        if self.kind != "linear" and dtype != torch.float32:
            one = float(self.kind == "offset")
            (weight, new), *rest = edits
            rounded = new.to(dtype).float()
            exact = (one + weight) / (one + rounded)
            scale = torch.where(exact.isfinite() & (exact > 0), exact, scale)
            edits = [(weight, rounded), *((t, t / scale) for t, _ in rest)]
        write([*edits, *self.multiplied(scale)])
        return scale

    def gathered(self, values: Tensor, source: Tensor, *, largest: bool = False) -> Tensor:
        """One value for each of a reader's channels (in,) -> for each of the producer's: their mean, or the largest."""
        start = torch.zeros(self.channels, dtype=values.dtype, device=values.device)
        how = "amax" if largest else "mean"
        return start.scatter_reduce(0, source.to(values.device), values, how, include_self=False)


def find_folds(block: Block, batch: int = 0) -> tuple[list[Fold], list[str]]:
    """All folds of a block that hold, norms first, and why others do not.

    Args:
        block: in float32 (:func:`weft.quantize.probe.in_float32`).
        batch: the number of the batch to try them on.
    """
    search = _Search(block, batch)
    return [*search.norms(), *search.linears()], search.refused


def folds_of(task: BlockTask) -> list[Fold]:
    """Folds of a task's block that have a reader among its layers and touch no layer of another task; others are noted.

    Args:
        task: whose block is in float32.

    Returns:
        Nothing where there is no data to try a fold on.
    """
    if not getattr(task.block.walk, "batches", None):
        return []
    folds, refused = find_folds(task.block)
    kept = []
    for fold in folds:
        taken = [n for n in (fold.name, *(r.name for r in fold.readers)) if n in task.elsewhere]
        if taken:
            refused.append(f"{fold.name}: another configuration has {taken[0]}")
        elif any(r.name in task.layers for r in fold.readers):
            kept.append(fold)
    if refused:
        task.note(task.block.name, not_folded=refused)
    return kept


class _Search:
    def __init__(self, block: Block, batch: int):
        self.block, self.batch = block, batch
        self.linear = block.linears()
        self.layers = {**self.linear, **_routers(block, self.linear)}
        self.units: dict[Any, list[str]] = {}
        for name, layer in self.layers.items():
            self.units.setdefault(_unit(name, layer), []).append(name)
        self.plain = run_block(block, batch, self.layers)
        self.refused: list[str] = []
        self.taken: set[str] = set()  # readers of a fold

    def run(self, edits: Iterable[Edit]) -> Run:
        with edited(edits):
            return run_block(self.block, self.batch, self.layers)

    def norms(self) -> Iterator[Fold]:
        widths = {matrix_of(m).shape[1] for m in self.layers.values()}
        for path, module in self.block.module.named_modules():
            weight = getattr(module, "weight", None)
            if (
                not isinstance(weight, nn.Parameter)
                or weight.dim() != 1
                or not any(n % len(weight) == 0 for n in widths)
            ):
                continue
            name, scale = f"{self.block.name}.{path}", _random(len(weight))
            for kind in ("norm", "offset"):
                fold = self._grown(Fold(name, module, kind, (0, len(weight)), ()), scale)
                if fold is not None:
                    yield fold
                    break

    def _grown(self, fold: Fold, scale: Tensor) -> Fold | None:
        """A norm's fold with all readers: behind a router some are only right when it has been compensated."""
        broken = None
        while True:
            found = self.run([*fold.divided(scale), *fold.multiplied(scale)])
            broken = broken or found
            if fold.readers and self._same(found, broken):
                return self._complete(fold)
            more = self._readers(found, scale, fold)
            if not more:
                if fold.readers:
                    self.refused.append(f"{fold.name}: more than {_few(fold)} depends on its scale")
                return None
            fold = Fold(fold.name, fold.module, fold.kind, fold.rows, (*fold.readers, *more))

    def _complete(self, fold: Fold) -> Fold | None:
        """A layer of the same width that did not run may read the norm too; of experts, one that ran speaks for all."""
        known = {r.name for r in fold.readers}
        width = {matrix_of(r.module).shape[1] for r in fold.readers}
        for names in self.units.values():
            ran = any(n in known or n in self.plain.inputs for n in names)
            if not ran and matrix_of(self.layers[names[0]]).shape[1] in width:
                self.refused.append(f"{fold.name}: {names[0]} did not run on the data, and may depend on its scale")
                return None
        if known & self.taken:
            return None
        self.taken |= known
        return fold

    def linears(self) -> Iterator[Fold]:
        widths = {matrix_of(m).shape[1] for m in self.layers.values()}
        for names in list(self.units.values()):
            if names[0] not in self.linear:
                continue
            for rows in _windows(len(matrix_of(self.linear[names[0]])), widths):
                found = list(self._linear(names, rows))
                if found:
                    yield from found
                    break

    def _linear(self, names: list[str], rows: tuple[int, int]) -> Iterator[Fold]:
        """Folds of one layer, or of all experts at once, each with its own reader."""
        parts = [Fold(name, self.linear[name], "linear", rows, ()) for name in names]
        scale = _random(rows[1] - rows[0])
        broken = self.run(e for p in parts for e in p.divided(scale))
        readers = [r for r in self._readers(broken, scale, parts[0]) if r.name not in names]
        if not readers:
            return
        if len(names) == 1:
            folds = [Fold(names[0], parts[0].module, "linear", rows, tuple(readers))]
        else:
            by_index = {r.module.index: r for r in readers if isinstance(r.module, Slice)}
            pairs = [(p, by_index.get(p.module.index)) for p in parts if isinstance(p.module, Slice)]
            folds = [Fold(p.name, p.module, "linear", rows, (r,)) for p, r in pairs if r is not None]
        if any(r.name in self.taken for f in folds for r in f.readers):
            return
        found = self.run(e for f in folds for e in (*f.divided(scale), *f.multiplied(scale)))
        if not self._same(found, broken):
            self.refused.append(f"{folds[0].name}: more than {_few(folds[0])} depends on its scale")
            return
        self.taken |= {r.name for f in folds for r in f.readers}
        yield from folds

    def _readers(self, found: Run, scale: Tensor, fold: Fold) -> list[Reader]:
        """Layers whose inputs are divided by the scales, and are not among the fold's; of experts all or none."""
        known = {r.name for r in fold.readers}
        readers = []
        for names in self.units.values():
            if names[0] in known:
                continue
            sources = [
                _source(self.plain.inputs[n], found.inputs.get(n), scale) for n in names if n in self.plain.inputs
            ]
            first = sources[0] if sources else None
            if first is not None and all(s is not None and torch.equal(s, first) for s in sources):
                readers += [Reader(n, self.layers[n], first) for n in names]
        return readers

    def _same(self, found: Run, broken: Run) -> bool:
        """Whether the output is what it was, and a scale that is not compensated for would have shown."""
        off, wrong = (float((r.output - self.plain.output).norm()) for r in (found, broken))
        return off <= TOLERANCE * float(self.plain.output.norm()) and off <= LEAKS * wrong


def _routers(block: Block, linear: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Other modules that multiply by a matrix of their own, (out, in)."""
    found = {}
    for path, module in block.module.named_modules():
        weight = module._parameters.get("weight")
        name = f"{block.name}.{path}" if path else block.name
        if name not in linear and weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            found[name] = module
    return found


def _unit(name: str, layer: nn.Module) -> Any:
    """Experts' matrices of one parameter are alike, and are tried together."""
    return (id(layer.experts), layer.part) if isinstance(layer, Slice) else name


def _random(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    exponents = torch.randint(-EXPONENTS, EXPONENTS + 1, (channels,), generator=generator)
    exponents[0] = 1  # or all might be ones, which show nothing
    return torch.exp2(exponents.float())


def _windows(rows: int, widths: set[int]) -> list[tuple[int, int]]:
    """Rows of a layer that may be what a layer of one of the widths reads: all, or the last of fused ones first."""
    sizes: dict[tuple[int, int], None] = {}
    for width in sorted(widths):
        if width % rows == 0:
            sizes[0, rows] = None
        if rows > width:
            rest = (rows - width) // 2  # of query rows as many as the reader has inputs, then keys, then values
            if (rows - width) % 2 == 0 and width % rest == 0:
                sizes[rows - rest, rows] = None
            if rows % width == 0:
                sizes |= dict.fromkeys((i, i + width) for i in range(rows - width, -1, -width))
    return list(sizes)


def _source(before: Tensor, after: Tensor | None, scale: Tensor) -> Tensor | None:
    """Which scale each input channel was divided by, if there is a pattern that says so."""
    inputs, channels = before.shape[1], len(scale)
    if after is None or after.shape != before.shape or inputs % channels:
        return None
    repeats, j = inputs // channels, torch.arange(inputs)
    sizes = before.abs().amax(0)
    if not float(sizes.amax()) > 0:
        return None
    bound = 1e-4 * sizes + 1e-6 * sizes.amax()
    for width in [d for d in range(channels, 0, -1) if channels % d == 0]:
        source = j // (repeats * width) * width + j % width  # heads of ``width`` channels, each repeated
        if bool(((after * scale[source] - before).abs() <= bound).all()):
            return source
        if repeats == 1:
            return None
    return None


def _few(fold: Fold) -> str:
    names = [r.name.rpartition(".")[2] for r in fold.readers]
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
