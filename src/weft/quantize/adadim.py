"""Let each layer's groups run along its inputs or along its outputs, whichever keeps its outlier weights to themselves.

Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language Models, Heo et al.,
arXiv:2309.15531 (ICLR 2024).

    Q_in(W):   a scale for each group of consecutive inputs of a row        (as everywhere else)
    Q_out(W) = Q_in(Wᵀ)ᵀ:  for each group of consecutive outputs of one input
    minimise over d in {in, out}:   ‖f(X; W) − f(X; Q_d(W))‖²

W (out, in). An input channel of large activations has sensitive weights; with groups along the outputs their scales are their
own. f is what the smallest module around the layers that share the input returns (attention for query, key, value; MLP for
gate and up), and for other layers the layer itself: tr(Δ G Δᵀ), G = Σ xᵀx (in, in), Δ = W − Q_d(W).

``rounding="gptq"`` rounds column by column (:mod:`weft.quantize.gptq`, order static): with groups along the outputs each
column's grids are fitted when its turn comes, to what all columns before have made of it.

Differences from the paper and its code: references are those of the block before any of its layers is rounded (the code
measures each layer behind those that were replaced before it). The axis is chosen with the rounding that is used, the code
chooses by rounding to nearest for GPTQ too. A layer whose outputs (inputs) do not divide into groups has them along its
inputs (outputs). Zero is on every grid. Inputs of a block are those that the quantised blocks before it give.
Complexity: twice that of the rounding, and two passes over ``tokens`` for each layer that shares its input.
Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.calibrate import BlockTask, Change, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Affine, Packed, Transposed
from weft.quantize.compensate import Factor
from weft.quantize.gptq import GPTQ, gptq_codes, gptq_factor
from weft.quantize.grid import Grid, checked, fit_grid, quantize
from weft.quantize.probe import Around, edited, in_float32, matrix_of

AXES = ("auto", "inputs", "outputs")
ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True)
class AdaDim(Grid, Change):
    """A grid, and along which axis its groups run.

    >>> AdaDim(bits=3, group_size=64, rounding="gptq").axis
    'auto'
    """

    axis: str = parameter("auto", "of groups: inputs, outputs, or auto: the better one for each layer", choices=AXES)
    rounding: str = parameter("nearest", "nearest or gptq", choices=ROUNDINGS)
    tokens: int = parameter(4096, "of the data that axes are tried on; whole batches", minimum=1)

    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in AXES or self.rounding not in ROUNDINGS or self.tokens < 1:
            raise RecipeError(
                f"AdaDim needs an axis of {', '.join(AXES)}, a rounding of {', '.join(ROUNDINGS)} and tokens ≥ 1, got "
                f"{self.axis!r}, {self.rounding!r}, {self.tokens!r}."
            )

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Packed:
        """A layer's codes along the axis with the smaller error of its outputs; see :class:`weft.calibrate.Change`."""
        gram = statistics.gram(name)
        made = adadim_codes(weight, gram, self)
        return made[min(made, key=lambda axis: _loss(weight, made[axis], gram))]

    def without_data(self) -> AdaDimNearest:
        """Rounding to nearest along the axis with the smaller error of the weights."""
        return AdaDimNearest(
            self.bits, self.group_size, self.kind, self.scale_dtype, self.ranges, self.axis, "nearest", self.tokens
        )

    def change_block(self, task: BlockTask) -> None:
        """Choose all axes by the block as it was, then round; the report has each layer's axis and both losses."""
        made: dict[str, Packed] = {}
        statistics = task.statistics
        with in_float32(task.block):
            arounds: dict[str, Around] = {}
            for name in task.layers:
                with task.attempt(name):
                    change, weight = task.instead(name, self), task.weight(name)
                    if change is not self:
                        made[name] = self.without_data().fit(name, weight, statistics)
                        continue
                    leader, sharing = statistics.shared(name)[0], statistics.shared(name)
                    tried = adadim_codes(weight, statistics.gram(name), self)
                    walked = len(sharing) > 1 and bool(getattr(task.block.walk, "batches", None))
                    if walked and leader not in arounds:
                        arounds = {leader: Around(task.block, sharing, self.tokens)}  # such layers follow one another
                    losses = {}
                    for axis, codes in tried.items():
                        if walked:
                            matrix = matrix_of(task.layers[name])
                            with edited([(matrix, codes.dequantize().reshape(matrix.shape))]):
                                losses[axis] = arounds[leader].loss()
                        else:
                            losses[axis] = _loss(weight, codes, statistics.gram(name))
                    best = min(losses, key=losses.__getitem__)
                    made[name] = tried[best]
                    task.note(name, axis=best, losses=losses)
        for name, codes in made.items():
            with task.attempt(name):
                task.put(name, codes)


@dataclass(frozen=True)
class AdaDimNearest(AdaDim):
    """What :class:`AdaDim` does to a layer that no data reached.

    >>> AdaDimNearest().needs
    ()
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Packed:
        """A layer's codes along the axis with the smaller error of its weights; see :class:`weft.calibrate.Change`."""
        gram = torch.eye(weight.shape[-1])
        made = adadim_codes(weight, gram, self)
        return made[min(made, key=lambda axis: _loss(weight, made[axis], gram))]


def adadim_codes(weight: Tensor, gram: Tensor, config: AdaDim) -> dict[str, Packed]:
    """A matrix with groups along each axis that is allowed and divides.

    Args:
        weight: (out, in).
        gram: (in, in), Σ xᵀx of the layer's inputs; (groups, n, n) for a convolution with groups, whose groups of weights
            run along its inputs.
        config: the grid, the axes, the rounding.

    Returns:
        Packed matrices (out, in) by axis, inputs before outputs.

    Raises:
        RecipeError: neither axis divides into groups, shapes do not fit, or values are not finite.

    Source: arXiv:2309.15531, sections 3.2 and 3.3.

    >>> weight = torch.tensor([[1.0, 100.0], [-2.0, 90.0]])
    >>> made = adadim_codes(weight, torch.eye(2), AdaDim(bits=2, group_size=2))
    >>> {axis: codes.dequantize()[:, 0].tolist() for axis, codes in made.items()}
    {'inputs': [0.0, 0.0], 'outputs': [1.0, -2.0]}
    """
    weight = checked(weight)
    if gram.shape[-1] != weight.shape[1]:
        raise RecipeError(
            f"AdaDim needs the Gram matrix of the layer's {weight.shape[1]} inputs, got {list(gram.shape)}."
        )
    size = config.group_size
    divides = {"inputs": weight.shape[1] % (size or 1) == 0, "outputs": len(weight) % (size or 1) == 0}
    divides["outputs"] &= gram.dim() == 2
    axes = [a for a, whole in divides.items() if whole]
    if not axes:
        raise RecipeError(
            f"Neither {weight.shape[1]} inputs nor {len(weight)} outputs divide into groups of {size}; give another "
            "group_size, or 0 for whole rows and columns."
        )
    axes = [a for a in axes if config.axis in ("auto", a)] or axes
    if config.rounding == "nearest":
        wide = weight.float()
        made: dict[str, Packed] = {a: quantize(w, *fit_grid(w, config), config) for a, w in _along(wide, axes).items()}
        return {a: Transposed(codes) if a == "outputs" else codes for a, codes in made.items()}
    columns = GPTQ(config.bits, config.group_size, config.kind, config.scale_dtype, config.ranges)
    made = {}
    if "inputs" in axes:
        made["inputs"] = gptq_codes(weight, gram, columns).codes
    if "outputs" in axes:
        whole = GPTQ(config.bits, 0, config.kind, config.scale_dtype, config.ranges)
        made["outputs"] = Transposed(gptq_by_outputs(weight, gptq_factor(gram, whole), config))
    return made


def gptq_by_outputs(weight: Tensor, factor: Factor, config: Grid, block_size: int = 128) -> Affine:
    """GPTQ with groups along the outputs, each column's grids fitted when its turn comes.

    Args:
        weight: (out, in); of float64 the columns are worked on in float64, else in float32.
        factor: of the Gram matrix of its inputs.
        config: the grid.
        block_size: columns that are rounded before the rest is updated; for speed only.

    Returns:
        The transposed matrix' codes (in, out), scales and zero points (in, groups).

    >>> gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> factor = gptq_factor(gram, GPTQ(group_size=0, order="none", damping=0))
    >>> weight = torch.tensor([[0.4, 0.0], [3.0, 3.0]])
    >>> [[round(v, 2) for v in row] for row in gptq_by_outputs(weight, factor, Grid(2, 0)).dequantize().tolist()]
    [[0.0, 3.0], [0.0, 3.0]]
    """
    fit_grid(weight.T, config)  # which checks the weight
    order = factor.order.to(weight.device)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = weight.detach().to(dtype).T[order].contiguous()  # columns lie as rows, (in, out)
    upper = torch.eye(len(w), dtype=dtype) if factor.upper is None else factor.upper.to(w)
    rows: list[Affine] = []
    for start in range(0, len(w), block_size):
        stop = min(start + block_size, len(w))
        errors = torch.empty_like(w[start:stop])
        for i, j in enumerate(range(start, stop)):
            column = w[j : j + 1]
            rows.append(quantize(column, *fit_grid(column, config), config))
            errors[i] = (w[j] - rows[-1].dequantize()[0]) / upper[j, j]
            w[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[i], alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    back = order.argsort()
    codes, scale, zero = (torch.cat([getattr(r, key) for r in rows])[back] for key in ("codes", "scale", "zero"))
    return Affine(codes, scale, zero, config.bits, config.codes[0])


def _along(weight: Tensor, axes: list[str]) -> dict[str, Tensor]:
    return {a: weight.T.contiguous() if a == "outputs" else weight for a in axes}


def _loss(weight: Tensor, codes: Packed, gram: Tensor) -> float:
    """tr(Δ G Δᵀ), up to a factor: the sizes of W and G are taken out, so that neither can overflow."""
    unit = weight.abs().amax().double().clamp(min=1e-300)
    grams = gram.unsqueeze(0) if gram.dim() == 2 else gram
    grams = (grams / grams.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-30)).float()
    delta = ((codes.dequantize().double() - weight.double()) / unit).float().unflatten(0, (len(grams), -1))
    return float(((delta @ grams) * delta).sum(dtype=torch.float64))


METHODS = (
    QuantizeMethod(
        name="adadim",
        family="quantize",
        config=AdaDim,
        summary="Groups along the inputs or the outputs of each layer, whichever keeps its outliers to themselves.",
        goal="shrink",
        paper="adadim",
        needs="calibration",
        checked_by=("brute force",),
        error=0.1,
        finer={"bits": (2, 3, 4, 8)},
    ),
)
