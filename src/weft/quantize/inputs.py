"""Quantise the inputs of layers beside their weights: any method for the weights, and what their inputs are rounded to.

    X̂ = s · round(X / s)          s of all inputs (from data), of each token, or of each group of a token's columns

===========  ==========================================================================  ==============================
inputs       values                                                                      scales
===========  ==========================================================================  ==============================
int8, int4   whole numbers of 8 or 4 bits                                                of each token, or one from data
e4m3         floating-point numbers of 8 bits                                            of each token or group, or one
nvfp4        e2m1 numbers of 4 bits in groups of 16                                      e4m3, under one from data
mxfp4 mxfp8  e2m1 numbers of 4 bits, or e4m3 numbers of 8, in groups of 32               powers of two
===========  ==========================================================================  ==============================

No paper: it is what the schemes of compressed-tensors say of inputs. The weights are those of the method alone; what
multiplies by them rounds the inputs (:func:`weft.packed.quantize_inputs`). One scale for all inputs is the largest size that
was seen, over the largest value. An expert that too few tokens reached takes that of the others of its block, whose inputs
are the same hidden states; a layer that none can be had for is left to scales of each token (int8, e4m3) or without (nvfp4).
Complexity: O(in) a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.calibrate import BlockTask, Change, Statistics
from weft.errors import RecipeError
from weft.packed import Activations, Packed
from weft.packed.levels import INPUTS, MICROSCALED, MINIFLOATS
from weft.quantize.nvfp4 import global_scale

LARGEST = {"int8": 127.0, "int4": 7.0, "e4m3": MINIFLOATS["e4m3"][3]}


@dataclass(frozen=True)
class QuantizedInputs(Change):
    """A method for weights, and what the inputs of their layers are rounded to.

    Attributes:
        weights: the method. Where it says what becomes of inputs (SmoothQuant), that stays.
        kind: of inputs: int8, int4, e4m3, nvfp4, mxfp4 or mxfp8.
        static: one scale for all inputs, from data; nvfp4 always has one.
        group_size: columns of a token that share a scale; 0: all, or as the kind says.

    >>> from weft.quantize import RTN
    >>> made = QuantizedInputs(RTN(4, 0), "int8").fit("layer", torch.ones(1, 2), None)
    >>> made.kind, made.dequantize().tolist()
    ('int8', [[1.0, 1.0]])
    >>> QuantizedInputs(RTN(), "e4m3", static=True).needs
    ('range',)
    """

    weights: Change
    kind: str = "int8"
    static: bool = False
    group_size: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Change):
            raise RecipeError(
                f"QuantizedInputs is around a configuration for weights such as RTN(), got {self.weights!r}."
            )
        if self.kind not in INPUTS or self.group_size < 0:
            raise RecipeError(f"Inputs are {', '.join(INPUTS)} with no negative group size, got {self!r}.")
        if self.kind in MICROSCALED and (self.group_size or (self.static and self.kind != "nvfp4")):
            raise RecipeError(
                f"Inputs in {self.kind} have groups and scales of their own; leave static and group_size out."
            )
        if self.static and self.group_size:
            raise RecipeError("One scale for all inputs leaves no groups of them; leave static or group_size out.")

    @property
    def _from_data(self) -> bool:
        return self.static or self.kind == "nvfp4"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # those of the method, and its own
        """Kinds of statistics that it reads."""
        return tuple(dict.fromkeys((*self.weights.needs, *(("range",) if self._from_data else ()))))

    @property
    def targets(self) -> bool:  # type: ignore[override]
        """Whether the method reads the original model's hidden states."""
        return self.weights.targets

    @property
    def file_format(self) -> str:  # type: ignore[override]
        """The format of files that says the method's weights."""
        return self.weights.file_format

    def scratch(self, rows: int, columns: int) -> float:
        """Bytes that changing one layer takes."""
        return self.weights.scratch(rows, columns)

    def nominal_bits(self, rows: int, columns: int) -> float:
        """Bits a weight in files, about."""
        return self.weights.nominal_bits(rows, columns)

    def without_data(self) -> Change | None:
        """The method's own way without data, and scales of inputs that need none."""
        weights = self.weights.without_data() or self.weights
        return weights if self.kind == "nvfp4" else QuantizedInputs(weights, self.kind, False, self.group_size)

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Packed:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        made = self.weights.fit(name, weight, statistics)
        if not isinstance(made, Packed):
            raise RecipeError(
                f"{name}: {type(self.weights).__name__} gives no packed weight, whose inputs could be quantised."
            )
        return self.around(made, _largest(statistics, name) if self._from_data else None)

    def change_block(self, task: BlockTask) -> None:
        """What the method does to the block, then the inputs of each layer that it packed."""
        self.weights.change_block(task)
        for name in task.layers:
            if name in task.packed:
                largest = self._seen(task, name) if self._from_data else None
                made = self.around(task.packed[name], largest)
                task.packed[name] = made if task.round is None else task.round(made)
                if isinstance(made, Activations):
                    task.note(name, inputs=made.kind, form=made.form)
                if self._from_data and largest is None:
                    task.note(name, few_rows=task.statistics.rows(name))

    def around(self, packed: Packed, largest: Tensor | None = None) -> Packed:
        """A packed weight, with its inputs quantised.

        Args:
            packed: (out, in).
            largest: 0-d, the largest size of inputs that was seen; None where none was.

        Raises:
            RecipeError: inputs do not divide into groups.
        """
        if isinstance(packed, Activations):
            return packed
        size = MICROSCALED[self.kind][1] if self.kind in MICROSCALED else self.group_size
        if size and packed.shape[1] % size:
            raise RecipeError(
                f"{packed.shape[1]} inputs do not divide into groups of {size}, in which they are quantised; leave these layers "
                "out with where, or take a scheme that quantises each token's inputs such as FP8_DYNAMIC."
            )
        if not self._from_data or largest is None:
            return packed if self.kind == "nvfp4" else Activations(packed, self.kind, None, self.group_size)
        if self.kind == "nvfp4":
            return Activations(packed, self.kind, global_scale(largest))
        scale = largest.float() / LARGEST[self.kind]
        return Activations(packed, self.kind, scale.clamp(min=torch.finfo(torch.float32).tiny).reshape(()))

    def _seen(self, task: BlockTask, name: str) -> Tensor | None:
        """The largest size of a layer's inputs; of the other experts' where too few rows reached it."""
        if not task.few(name):
            return _largest(task.statistics, name)
        leaf = name.rpartition(".")[2]
        others = [n for n in task.layers if n.rpartition(".")[2] == leaf and not task.few(n)]
        return torch.stack([_largest(task.statistics, n) for n in others]).max() if others else None


def _largest(statistics: Statistics, name: str) -> Tensor:
    if statistics.has(name, "max_abs"):
        return statistics.max_abs(name).max()
    return torch.maximum(statistics.maximum(name).abs().max(), statistics.minimum(name).abs().max())
