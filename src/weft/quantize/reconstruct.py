"""Fit the quantised weights of a block by gradient descent, so that its outputs stay those of the original model.

    minimise over θ    E ℓ( block(X̂; Ŵ(θ)), block(X; W) )  +  penalties of θ

X̂ is what the quantised blocks before give, X what the original ones gave. Each layer's Ŵ(θ) is a :class:`Soft`: a matrix
(out, in) that depends on what is trained, and the packed weight that its present state stands for. One descent serves two
losses: a whole block over mini-batches of the calibration samples (:func:`reconstruct_block`), and one layer from the Gram
matrix G of its inputs, tr(Δ G Δᵀ) with Δ = Ŵ − W (:func:`reconstruct_layer`).

The state with the least loss of the *packed* weights on samples that are held out (a layer: of the Gram matrix) is kept, the
start among them: on those the result is never worse than the start. A method is a :class:`Reconstruction` that makes a Soft
of a matrix; its start should be rounding to nearest.

Everything is computed in float32. Padding is left out of the loss through the batch's attention mask. Peak memory: the
block in float32, what is trained with its gradients, the optimizer's state and one copy, and one mini-batch's activations.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weft.calibrate import BlockTask, Change, Statistics
from weft.calibrate.activations import nested_map
from weft.calibrate.forward import hidden_of
from weft.calibrate.watch_block import tokens_of
from weft.errors import RecipeError
from weft.function.layout import layout_of
from weft.packed import Packed
from weft.quantize.grid import Grid
from weft.quantize.rtn import RTN
from weft.quantize.soft import Descent, Soft, Weights, descend

HELD_OUT = 8  # one of so many samples is held out


def reconstruct_layer(weight: Tensor, gram: Tensor, soft: Soft, descent: Descent) -> tuple[float, float]:
    """Train one layer's Soft to minimise tr(Δ G Δᵀ); the descent's loss and samples are not used.

    Args:
        weight: (out, in).
        gram: (in, in), Σ xᵀx of its inputs; (groups, in, in) of a convolution with groups.
        soft: what is trained.
        descent: how.

    Returns:
        The scores of the start and of the end: tr(Δ G Δᵀ) / tr(W G Wᵀ), or 0 where the latter is.

    Raises:
        RecipeError: shapes do not fit.
    """
    stack = gram.detach() if gram.dim() == 3 else gram.detach().unsqueeze(0)
    if weight.dim() != 2 or stack.dim() != 3 or stack.shape[1:] != 2 * weight.shape[1:] or len(weight) % len(stack):
        raise RecipeError(f"A layer {list(weight.shape)} needs a Gram matrix of its inputs, got {list(gram.shape)}.")
    mean = stack.diagonal(dim1=1, dim2=2).double().mean().clamp(min=torch.finfo(torch.float64).tiny)
    g = (stack / mean).float()
    original = weight.detach().float()
    largest = original.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)

    def energy(new: Tensor) -> Tensor:
        rows = (new / largest).unflatten(0, (len(g), -1))  # (groups, out / groups, in)
        return ((rows @ g) * rows).sum()

    whole = energy(original).clamp(min=torch.finfo(torch.float32).tiny)
    return descend(
        {"": soft},
        lambda new: energy(new[""] - original) / whole,
        lambda new: float(energy(new[""] - original) / whole),
        descent,
        checks=32,  # as cheap as a step
    )


def reconstruct_block(
    task: BlockTask, softs: Mapping[str, Soft], descent: Descent, *, biases: bool = False
) -> tuple[float, float]:
    """Train the Softs of a block's layers together, and put their packed weights.

    Args:
        task: the block, walked with ``targets``.
        softs: by the layers' names.
        descent: how.
        biases: train the layers' biases too.

    Returns:
        The mean loss of held-out tokens at the start and at the end, as parts of the targets' own loss against zero; also
        noted in the report.
    """
    data = _Data(task, descent)
    beside = data.biases(softs) if biases else {}
    start, end = descend(softs, data.loss, data.score, descent, beside)
    for name, soft in softs.items():
        with task.attempt(name):
            task.put(name, soft.packed())
    task.note(task.block.name, loss_before=start, loss=end)
    with torch.no_grad():
        for name, bias in beside.items():
            layer: Any = task.layers[name.removesuffix(_BIAS)]
            layer.bias.copy_(bias.to(layer.bias.dtype))
    return start, end


@dataclass(frozen=True)
class Reconstruction(Change):
    """The base of configurations that train a Soft: a block at a time, or one layer from its Gram matrix.

    Subclasses give :meth:`soft` and :meth:`descent`, and say what they do without data.
    """

    needs: ClassVar[tuple[str, ...]] = ("gram",)
    targets: ClassVar[bool] = True

    def soft(self, weight: Tensor, generator: torch.Generator) -> Soft:
        """What is trained for a matrix (out, in) float32."""
        raise NotImplementedError

    def descent(self) -> Descent:
        """How it is trained."""
        raise NotImplementedError

    def trains_biases(self) -> bool:
        """Whether biases are trained with a block."""
        return False

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Packed:
        """One layer from the Gram matrix of its inputs; see :class:`weft.calibrate.Change`."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
            raise RecipeError(
                f"What is quantised is a matrix (out, in) of numbers, got {list(weight.shape)} {weight.dtype}."
            )
        original = weight.detach().float().contiguous()
        soft = self.soft(original, generator)
        reconstruct_layer(original, statistics.gram(name), soft, self.descent())
        return soft.packed()

    def change_block(self, task: BlockTask) -> None:
        """The layers of a block together; those that few rows reached without data."""
        softs: dict[str, Soft] = {}
        for name in task.layers:
            with task.attempt(name):
                change = task.instead(name, self)
                if change is self:
                    softs[name] = self.soft(task.weight(name), task.generator(name))
                else:
                    task.put(name, change.fit(name, task.weight(name), task.statistics))
        if softs:
            with task.attempt(task.block.name):
                reconstruct_block(task, softs, self.descent(), biases=self.trains_biases())


def nearest_of(grid: Grid) -> RTN:
    """Rounding to nearest on a configuration's own grid, for layers without data.

    >>> nearest_of(Grid(bits=3, kind="narrow")).kind
    'narrow'
    """
    return RTN(**{f.name: getattr(grid, f.name) for f in fields(Grid)})


_BIAS = "\0bias"  # behind a layer's name: its bias


class _Held(nn.Module):
    """A block, and linear layers over slices of its fused experts, whose weights are not the block's."""

    def __init__(self, block: nn.Module, experts: list[nn.Module]):
        super().__init__()
        self.block, self.experts = block, nn.ModuleList(experts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


class _Data:
    """Mini-batches of a block, and its losses on them."""

    def __init__(self, task: BlockTask, descent: Descent):
        self.task, self.descent, self.block = task, descent, task.block
        self.generator = task.generator()
        held = _Held(task.block.module, list(task.block.experts.values()))
        self.held = held
        paths = {id(m): path for path, m in held.named_modules()}
        self.paths = {name: paths[id(layer)] for name, layer in task.layers.items()}
        named = {**dict(held.named_parameters()), **dict(held.named_buffers())}
        self.plain = {n: t.detach().float() if t.is_floating_point() else t for n, t in named.items()}
        rows = [self._hidden(i).shape[0] for i in range(len(task.block.walk.batches))]
        self.sliced = all(self._slices(i) for i in range(len(rows)) if rows[i] > 1)
        units = [(i, row) for i, n in enumerate(rows) for row in (range(n) if self.sliced else (-1,))]
        order = torch.randperm(len(units), generator=self.generator).tolist()
        few = len(units) < 4  # nothing to hold out: all are trained and judged on
        apart = 0 if few else -(-len(units) // HELD_OUT)
        self.judge = self._by_batch([units[i] for i in (order if few else order[:apart])])
        self.train = self._by_batch([units[i] for i in (order if few else order[apart:])])
        zeros = [descent.loss(torch.zeros_like(t), t) for _, _, t, keep in map(self._batch, self.judge.items())]
        masks = [keep for _, _, _, keep in map(self._batch, self.judge.items())]
        self.scale = float(_mean(zeros, masks)) or 1.0

    def biases(self, names: Mapping[str, Any]) -> dict[str, nn.Parameter]:
        """Trainable copies of the layers' biases."""
        found: dict[str, nn.Parameter] = {}
        for name in names:
            bias = getattr(self.task.layers[name], "bias", None)
            if bias is not None:
                found[name + _BIAS] = nn.Parameter(bias.detach().to(torch.float32, copy=True))
        return found

    def loss(self, weights: Weights) -> Tensor:
        """On a mini-batch that is drawn: some samples of one batch, which are padded alike."""
        numbers = list(self.train)
        counts = torch.tensor([float(len(rows)) for rows in self.train.values()])
        number = numbers[int(torch.multinomial(counts, 1, generator=self.generator))]
        rows = self.train[number]
        picked = torch.randperm(len(rows), generator=self.generator)[: self.descent.samples].tolist()
        return self._on((number, [rows[i] for i in picked]), weights)

    @torch.no_grad()
    def score(self, weights: Weights) -> float:
        """On all samples that are held out."""
        parts, masks = [], []
        for item in self.judge.items():
            args, kwargs, target, keep = self._batch(item)
            parts.append(self.descent.loss(self._run(weights, args, kwargs), target))
            masks.append(keep)
        return float(_mean(parts, masks)) / self.scale

    def _on(self, item: tuple[int, list[int]], weights: Weights) -> Tensor:
        args, kwargs, target, keep = self._batch(item)
        return _mean([self.descent.loss(self._run(weights, args, kwargs), target)], [keep]) / self.scale

    def _run(self, weights: Weights, args: Any, kwargs: Any) -> Tensor:
        swapped = dict(self.plain)
        for name, value in weights.items():
            layer: Any = self.task.layers[name.removesuffix(_BIAS)]
            path = self.paths[name.removesuffix(_BIAS)]
            if name.endswith(_BIAS):
                swapped[f"{path}.bias"] = value
                continue
            layout = layout_of(layer, "weight", layer.weight)
            swapped[f"{path}.weight"] = layout.stored(value.reshape(layout.seen(layer.weight).shape))
        return hidden_of(functional_call(self.held, swapped, args, kwargs), self.block.name)

    def _batch(self, item: tuple[int, list[int]]) -> tuple[Any, Any, Tensor, Tensor | None]:
        """Arguments, targets and mask of rows of a batch, in float32; all rows where a batch is one sample."""
        number, rows = item
        args, kwargs = self.block.batch(number)
        target, keep = self.block.target(number).float(), tokens_of(self.block, number)
        if keep is not None and keep.shape != target.shape[:2]:
            keep = None
        count = self._hidden(number).shape[0]
        if not self.sliced or count == 1:
            return *nested_map((args, kwargs), _wide), target, keep
        picked = torch.tensor(rows)
        return *_rows((args, kwargs), count, picked), target[picked], None if keep is None else keep[picked]

    def _hidden(self, number: int) -> Tensor:
        args, kwargs = self.block.batch(number)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    @torch.no_grad()
    def _slices(self, number: int) -> bool:
        """Whether a batch's rows can run by themselves: the first and last give what they give in the whole batch."""
        args, kwargs = self.block.batch(number)
        count = self._hidden(number).shape[0]
        picked = torch.tensor([0, count - 1])
        whole = self._run({}, *nested_map((args, kwargs), _wide))
        try:
            part = self._run({}, *_rows((args, kwargs), count, picked))
        except (RuntimeError, IndexError, ValueError):
            return False
        if whole.shape[0] != count or part.shape != whole[picked].shape:
            return False
        keep = tokens_of(self.block, number)
        real = keep[picked].bool() if keep is not None and keep.shape == whole.shape[:2] else ...
        return torch.allclose(part[real], whole[picked][real], rtol=1e-3, atol=1e-4 * float(whole.abs().max()))

    @staticmethod
    def _by_batch(units: list[tuple[int, int]]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for number, row in sorted(units):
            found.setdefault(number, []).append(row)
        return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _rows(value: Any, count: int, picked: Tensor) -> Any:
    """Rows of every tensor that has ``count`` of them on its first of several axes."""
    return nested_map(value, lambda t: _wide(t[picked] if t.dim() > 1 and t.shape[0] == count else t))


def _mean(losses: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    """Over tokens that are not padding."""
    total, count = torch.zeros(()), 0.0
    for loss, mask in zip(losses, masks):
        keep = torch.ones_like(loss) if mask is None else mask.to(loss.dtype)
        total = total + (loss * keep).sum()
        count += float(keep.sum())
    return total / max(count, 1.0)
