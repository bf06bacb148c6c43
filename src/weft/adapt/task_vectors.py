"""Fine-tune a model by a number for each tensor of each other fine-tune: how far to go the way that it went.

aTLAS, Zhang et al., arXiv:2407.02880 (2024), without its recipes for training; task vectors are Ilharco et al.'s.

    W = W₀ + Σ_k c_k τ_k              τ_k = W_k − W₀, the weight in checkpoint k without that of the model now
    granularity="tensor"              c: K numbers for each tensor; "model": K numbers in all, as task arithmetic has
    partitions=P                      c: (K, P), each entry of W in one of P groups, drawn at random (the paper's ×P)
    softmax=True                      Σ_k softmax(c)_k W_k: a learned soup, which starts at the mean of the checkpoints

c starts at 0, so the model starts unchanged, and may go anywhere: below 0 it forgets. With K checkpoints of J tensors,
K · J · P numbers train. Norms' weights have numbers, too; for biases attach a second adapter with ``tensor="bias"``.

Differences from the paper and its code: each tensor's groups are drawn for its name; the code draws them for its shape,
so equal shapes share them, and its groups reach matrices alone, other tensors stay at W₀. The τ are kept in float32 by
default (code: float16).
Complexity: O(K · elements) in each pass and in memory, and a state dict holds the τ: bake or export the result.
Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.errors import RecipeError
from weft.function.attach import holders
from weft.function.coefficients import GRANULARITIES, combinations
from weft.function.layout import layout_of
from weft.function.protocol import FunctionConfig, FunctionMethod, WeightFunction, wide
from weft.method import parameter


@dataclass(frozen=True)
class TaskVectors:
    """Trained coefficients of the differences between checkpoints and the model.

    Source: arXiv:2407.02880, section 3.

    >>> import tempfile, weft
    >>> folder, model = tempfile.mkdtemp(), nn.Linear(3, 2)
    >>> weft.save(nn.Linear(3, 2), folder)
    >>> weft.adapt_(model, TaskVectors(checkpoints=(folder,)), where="*").trainable
    1
    """

    takes_vectors: ClassVar[bool] = True

    checkpoints: tuple[str, ...] = parameter(help="fine-tunes of the model: anything that weft.open opens")
    base: str = parameter("", "what they were tuned from; empty: the model as it is now")
    granularity: str = parameter("tensor", "coefficients for each tensor, or for the model", choices=GRANULARITIES)
    partitions: int = parameter(1, "groups of entries with coefficients of their own", minimum=1)
    softmax: bool = parameter(False, "coefficients are weights of a mean of the checkpoints (a learned soup)")
    start: float = parameter(0.0, "of all coefficients")
    dtype: str = parameter(
        "float32",
        "of the task vectors: at least float32, the weight's own, or narrower",
        choices=("float32", "weight", "bfloat16", "float16"),
    )
    seed: int = parameter(0, "of the groups", minimum=0)

    def build(self, weight: Tensor, *, batched: bool) -> WeightFunction:
        """Not for one weight alone: :meth:`plan` finds each by its name."""
        raise RecipeError("Task vectors are found by names; attach them with weft.adapt_(model, TaskVectors(…)).")

    def plan(
        self, model: nn.Module, weights: Mapping[str, Tensor], data: Iterable[Any] | None
    ) -> Mapping[str, FunctionConfig]:
        """The function for each weight; checkpoints are read tensor by tensor.

        Raises:
            RecipeError: there are no checkpoints, or shapes differ, or numbers are NaN or too large for ``dtype``.
            CheckpointError: a file is missing or damaged, or has no such tensor.
        """
        if not self.checkpoints:
            raise RecipeError("TaskVectors needs one checkpoint or more: fine-tunes of the model, by path or Hub id.")
        layers = holders(model, weights)
        with ExitStack() as files:
            opened = [files.enter_context(open_checkpoint(path)) for path in self.checkpoints]
            base = files.enter_context(open_checkpoint(self.base)) if self.base else None
            vectors = {}
            for name, weight in weights.items():
                start = weight if base is None else _read(base, name, layers[name], weight)
                kept = [self._vector(c, name, layers[name], weight, start) for c in opened]
                vectors[name] = torch.stack(kept)
        return combinations(
            weights,
            vectors,
            granularity=self.granularity,
            partitions=self.partitions,
            softmax=self.softmax,
            start=self.start,
            seed=self.seed,
        )

    def _vector(
        self, checkpoint: Checkpoint, name: str, layers: Mapping[str, nn.Module], weight: Tensor, start: Tensor
    ) -> Tensor:
        vector = _read(checkpoint, name, layers, weight) - start.to(wide(weight))
        kinds = {"float32": wide(weight), "weight": weight.dtype}
        kept = vector.to(kinds.get(self.dtype) or getattr(torch, self.dtype))
        if not kept.is_meta and not bool(kept.isfinite().all()):
            cause = "holds NaN or infinity" if not bool(vector.isfinite().all()) else f"is too large for {self.dtype}"
            raise RecipeError(
                f"{checkpoint.name}: the task vector of {name} {cause}; repair it, or choose another dtype."
            )
        return kept


def _read(checkpoint: Checkpoint, name: str, layers: Mapping[str, nn.Module], weight: Tensor) -> Tensor:
    """A weight's tensor, under any of its tied names, as functions see it, in at least float32."""
    found = next((n for n in layers if n in checkpoint), name)
    tensor = checkpoint[found].torch().to(weight.device, wide(weight))
    tensor = layout_of(layers[name], name.rpartition(".")[2], tensor).seen(tensor)
    if tensor.shape != weight.shape:
        raise RecipeError(
            f"{name} is {list(weight.shape)}, and {list(tensor.shape)} in {checkpoint.name}: it is no fine-tune of this "
            "model. Leave the layer out, or choose another checkpoint."
        )
    return tensor


METHODS = (
    FunctionMethod(
        name="task_vectors",
        family="adapt",
        config=TaskVectors,
        summary="A trained number for each tensor of other fine-tunes: how far to go the way that each went.",
        goal="adapt",
        paper="atlas",
        starts_at="weight",
        adapter=True,
        checkpoints="checkpoints",
        checked_by=("closed form", "brute force"),
    ),
)
