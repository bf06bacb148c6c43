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
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.calibrate import BlockTask, Change, Statistics
from weft.errors import RecipeError
from weft.packed import Packed
from weft.quantize._block_data import BIAS, BlockData
from weft.quantize.grid import Grid, checked
from weft.quantize.rtn import RTN
from weft.quantize.soft import Descent, Soft, descend


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
        RecipeError: shapes do not fit, or the Gram matrix is not finite.

    >>> from weft.quantize import FlexRounding
    >>> generator = torch.Generator().manual_seed(0)
    >>> weight, x = torch.randn(8, 64, generator=generator), torch.randn(99, 64, generator=generator)
    >>> before, after = reconstruct_layer(weight, x.T @ x, FlexRounding(weight, Grid(bits=3, group_size=0)), Descent(50, 0.01))
    >>> after < before
    True
    """
    stack = gram.detach() if gram.dim() == 3 else gram.detach().unsqueeze(0)
    if weight.dim() != 2 or stack.dim() != 3 or stack.shape[1:] != 2 * weight.shape[1:] or len(weight) % len(stack):
        raise RecipeError(f"A layer {list(weight.shape)} needs a Gram matrix of its inputs, got {list(gram.shape)}.")
    if not stack.isfinite().all():
        raise RecipeError(
            "The Gram matrix of a layer's inputs holds NaN or infinite values. The data or the statistics are damaged; gather "
            "them again."
        )
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
    data = BlockData(task, descent)
    beside = data.biases(softs) if biases else {}
    start, end = descend(softs, data.loss, data.score, descent, beside)
    for name, soft in softs.items():
        with task.attempt(name):
            task.put(name, soft.packed())
            task.note(name, block_loss_before=start, block_loss=end)
    with torch.no_grad():
        for name, bias in beside.items():
            layer: Any = task.layers[name.removesuffix(BIAS)]
            layer.bias.copy_(bias.to(layer.bias.dtype))
    return start, end


@dataclass(frozen=True)
class Reconstruction(Change, ABC):
    """The base of configurations that train a Soft: a block at a time, or one layer from its Gram matrix.

    Subclasses give :meth:`soft` and :meth:`descent`, and say what they do without data
    (:meth:`~weft.calibrate.Change.without_data`).

    >>> from weft.quantize import SignRound
    >>> isinstance(SignRound(), Reconstruction), Reconstruction.targets
    (True, True)
    """

    needs: ClassVar[tuple[str, ...]] = ("gram",)
    targets: ClassVar[bool] = True

    @abstractmethod
    def soft(self, weight: Tensor, generator: torch.Generator) -> Soft:
        """What is trained for a matrix (out, in) float32."""

    @abstractmethod
    def descent(self) -> Descent:
        """How it is trained."""

    def trains_biases(self) -> bool:
        """Whether biases are trained with a block."""
        return False

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Packed:
        """One layer from the Gram matrix of its inputs; see :class:`weft.calibrate.Change`."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        original = checked(weight).float().contiguous()
        soft = self.soft(original, generator)
        reconstruct_layer(original, statistics.gram(name), soft, self.descent())
        return soft.packed()

    def change_block(self, task: BlockTask) -> None:
        """The layers of a block together; those that few rows reached without data, those outside of blocks one by one."""
        if getattr(task.block, "is_rest", False):
            super().change_block(task)
            return
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
            # the report is of layers
            for fact, value in task.notes.pop(task.block.name).items():
                for name in softs:
                    task.note(name, **{fact: value})


def nearest_of(grid: Grid) -> RTN:
    """Rounding to nearest on a configuration's own grid, for layers without data.

    >>> nearest_of(Grid(bits=3, kind="narrow")).kind
    'narrow'
    """
    return RTN(**{f.name: getattr(grid, f.name) for f in fields(Grid)})
