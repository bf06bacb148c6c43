"""A block's calibration samples: mini-batches to train on, others to judge by, and its losses on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weft.calibrate import BlockTask
from weft.calibrate.activations import nested_map
from weft.calibrate.forward import hidden_of
from weft.calibrate.watch_block import tokens_of
from weft.function.layout import layout_of
from weft.quantize.soft import Descent, Weights

HELD_OUT = 8  # one of so many samples is held out
BIAS = "\0bias"  # behind a layer's name: its bias


class _Held(nn.Module):
    """A block, and linear layers over slices of its fused experts, whose weights are not the block's."""

    def __init__(self, block: nn.Module, experts: list[nn.Module]):
        super().__init__()
        self.block, self.experts = block, nn.ModuleList(experts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


class BlockData:
    """Mini-batches of a block, and its losses on them.

    Args:
        task: the block, walked with ``targets``.
        descent: samples of a mini-batch, and the loss.

    Attributes:
        sliced: whether rows of batches are samples of their own; else a batch is one.
        train, judge: rows by batch, those to train on and those that are held out; −1 is a whole batch.
        scale: the loss of zeros, of which losses are parts.
    """

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
        held_out = [(target, keep) for _, _, target, keep in map(self._batch, self.judge.items())]
        zeros = [descent.loss(torch.zeros_like(target), target) for target, _ in held_out]
        self.scale = float(_mean(zeros, [keep for _, keep in held_out])) or 1.0

    def biases(self, names: Mapping[str, Any]) -> dict[str, nn.Parameter]:
        """Trainable copies of the layers' biases."""
        found: dict[str, nn.Parameter] = {}
        for name in names:
            bias = getattr(self.task.layers[name], "bias", None)
            if bias is not None:
                found[name + BIAS] = nn.Parameter(bias.detach().to(torch.float32, copy=True))
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
            layer: Any = self.task.layers[name.removesuffix(BIAS)]
            path = self.paths[name.removesuffix(BIAS)]
            if name.endswith(BIAS):
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
