"""Reconstruct blocks with what one chooses: which variable rounds, which loss, which optimizer, what else is trained.

Gradient-Based Post-Training Quantization: Challenging the Status Quo, Yvinec et al., arXiv:2308.07662 (2023); AdaRound is Up
or Down? Adaptive Rounding for Post-Training Quantization, Nagel et al., arXiv:2004.10568 (ICML 2020).

    minimise over θ    E ℓ( block(X̂; Ŵ(θ)), block(X; W) ) + λ R(θ)

================  =========================================================================  ====================
``variable``      Ŵ(θ) with W (out, in), the grid's s, z (out, groups), φ = W/s − ⌊W/s⌋        starts with
================  =========================================================================  ====================
adaround          s (clamp(⌊W/s⌋ + h + z) − z),  h = clip(1.2 σ(V) − 0.1, 0, 1)                 h = φ: Ŵ = W
sigmoid           the same with h = σ(k V), k growing from 1 to 20                              h = φ
straight-through  s (clamp(round(W/s + V) + z) − z), rounding passed straight through           V = 0
division          that of FlexRound (:mod:`weft.quantize.flexround`)                            divisors of 1
power             that of NUPES (:mod:`weft.quantize.nupes`), codes over their whole range      PowerQuant
================  =========================================================================  ====================

AdaRound's R = mean (1 − |2h − 1|^β) drives h to 0 or 1: it is off for the first fifth of the steps, then β falls from 20 to 2.
What is packed has h rounded; where V never moved it is rounding to nearest. Losses ℓ of the block's outputs: l2, l1, or
cosine; in Python also :func:`weft.quantize.soft.weighted` and :func:`weft.quantize.soft.divergences`. ``scales`` trains s too
(where it multiplies), ``biases`` the layers' biases.

:func:`importance` is the paper's other part, what quantising a unit costs the task's loss, for choosing bits:

    I_u = Σ_{w ∈ u} |g_w (Ŵ − W)_w| + ½ F_w (Ŵ − W)_w²          g the gradient, F = E[g²]

Differences from the paper: its full text was not at hand; what is beyond its abstract is a reconstruction from AdaRound and
its followers, the defaults among it. λ multiplies a loss in which 1 is that of rounding to nearest. Steps are fewer (it is
usual to make 10 000), so AdaRound's learning rate is larger.
Complexity: as many numbers to train as weights, and the optimizer's state.
Re-implemented from the equations (no official code).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Affine, Packed
from weft.quantize.flexround import FlexRounding
from weft.quantize.grid import Grid, fit_grid
from weft.quantize.nupes import PowerCodes
from weft.quantize.powerquant import PowerQuant
from weft.quantize.reconstruct import Reconstruction, nearest_of
from weft.quantize.rtn import RTN
from weft.quantize.soft import OPTIMIZERS, Descent, Soft, angles, sizes, squares, through

# learning rates that fit some hundred steps: how far each variable has to travel differs
VARIABLES = {"adaround": 0.1, "sigmoid": 0.5, "straight-through": 1e-3, "division": 1e-2, "power": 1e-3}
LOSSES = {"l2": squares, "l1": sizes, "cosine": angles}
STRETCH, WARM, FIRST, LAST = 0.1, 0.2, 20.0, 2.0  # AdaRound's: of the sigmoid, share of steps without R, β
SLOPE = 20.0  # of the sigmoid at the end
SCALE_RATE = 1e-3  # learning rate of scales' logarithms


@dataclass(frozen=True)
class GradientPTQ(Grid, Reconstruction):
    """A grid, and the choices.

    >>> GradientPTQ(bits=3, variable="straight-through", optimizer="sign").loss
    'l2'
    """

    variable: str = parameter("adaround", "what rounds: " + ", ".join(VARIABLES), choices=tuple(VARIABLES))
    loss: str = parameter("l2", "of a block's outputs: l2, l1 or cosine", choices=tuple(LOSSES))
    optimizer: str = parameter("adam", "adam, adamax, momentum or sign", choices=OPTIMIZERS)
    scales: bool = parameter(False, "train the grids' scales too")
    biases: bool = parameter(False, "train the layers' biases too")
    steps: int = parameter(400, "gradient steps for each block", minimum=0)
    rate: float = parameter(0.0, "learning rate of the first step; 0: what fits the variable", minimum=0)
    samples: int = parameter(8, "sequences in a mini-batch", minimum=1)
    penalty: float = parameter(100.0, "λ of AdaRound's R", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [
            (k, v)
            for k, v, known in (
                ("variable", self.variable, VARIABLES),
                ("loss", self.loss, LOSSES),
                ("optimizer", self.optimizer, OPTIMIZERS),
            )
            if v not in known
        ]
        if wrong:
            raise RecipeError(f"There is no {wrong[0][0]} {wrong[0][1]!r}; see the module's table.")
        if self.steps < 0 or self.samples < 1 or not (self.rate >= 0 and self.penalty >= 0):
            raise RecipeError(
                f"Reconstruction needs steps, rate and penalty ≥ 0 and samples ≥ 1, got steps={self.steps!r}, "
                f"rate={self.rate!r}, penalty={self.penalty!r} and samples={self.samples!r}."
            )
        if self.variable == "power" and self.kind != "narrow":
            raise RecipeError(f"Powers have as many values below zero as above: give kind='narrow', not {self.kind!r}.")

    def soft(self, weight: Tensor, generator: torch.Generator) -> Soft:
        """The chosen variable of a matrix; nothing is drawn."""
        if self.variable == "division":
            return FlexRounding(weight, self)
        if self.variable == "power":
            return PowerCodes(weight, PowerQuant(self.bits, self.group_size))
        return Rounding(weight, self)

    def descent(self) -> Descent:
        """The chosen optimizer and loss; rates fall but where R or the slope decides towards the end."""
        soft = self.variable in ("adaround", "sigmoid")
        decay = "linear" if self.optimizer == "sign" else "none" if soft else "cosine"
        return Descent(self.steps, self.first_rate, self.optimizer, decay, self.samples, LOSSES[self.loss])

    @property
    def first_rate(self) -> float:
        """The learning rate of the first step."""
        return self.rate or (1 / max(1, self.steps) if self.optimizer == "sign" else VARIABLES[self.variable])

    def trains_biases(self) -> bool:
        """Whether biases are trained with a block."""
        return self.biases

    def without_data(self) -> RTN:
        """Rounding to nearest on the same grid."""
        return nearest_of(self)


class Rounding(Soft):
    """The weights of one layer, each rounded up or down: the variables adaround, sigmoid and straight-through.

    Args:
        weight: (out, in).
        config: grid, variable, penalty, whether scales are trained.

    Attributes:
        variable: (out, groups, group_size), V.
        scale_log: (out, groups), of what scales are multiplied by.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite.

    Source: arXiv:2004.10568, equations 21 to 24.

    >>> soft = Rounding(torch.tensor([[0.0, 0.875, 2.125, 3.0]]), GradientPTQ(bits=2, group_size=0))
    >>> [round(w, 3) for w in soft()[0].tolist()], soft.packed().dequantize().tolist()
    ([0.0, 0.875, 2.125, 3.0], [[0.0, 1.0, 2.0, 3.0]])
    """

    steps: Tensor
    scale: Tensor
    zero: Tensor
    first: Tensor

    def __init__(self, weight: Tensor, config: GradientPTQ):
        super().__init__()
        scale, zero = fit_grid(weight, config)
        self.config, self.dtype = config, scale.dtype
        self.progress = 0.0
        groups = weight.detach().float().contiguous().unflatten(1, (scale.shape[1], -1))
        self.register_buffer("steps", groups / scale.float().unsqueeze(-1))  # W / s
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero", zero.float())
        self.variable = nn.Parameter(self._start())
        self.register_buffer("first", self.variable.detach().clone())
        self.scale_log = nn.Parameter(torch.zeros_like(self.scale), requires_grad=config.scales)

    def forward(self) -> Tensor:
        """Ŵ (out, in), float32; between two values of the grid while rounding is not decided."""
        if self.config.variable == "straight-through":
            moved = self.steps + self.variable
            return self._weight(through(moved, moved.round()))
        return self._weight(self.steps.floor() + self.shares())

    def shares(self) -> Tensor:
        """h (out, groups, group_size): how far up from the lower of its two values each weight is."""
        if self.config.variable == "sigmoid":
            return torch.sigmoid((1 + (SLOPE - 1) * self.progress) * self.variable)
        return ((1 + 2 * STRETCH) * torch.sigmoid(self.variable) - STRETCH).clamp(0, 1)

    @torch.no_grad()
    def packed(self) -> Affine:
        """Codes with every weight rounded up or down."""
        if self.config.variable == "straight-through":
            codes = (self.steps + self.variable).round()
        else:
            decided = self.steps.floor() + (self.shares() >= 0.5)
            codes = torch.where(self.variable == self.first, self.steps.round(), decided)
        codes = (codes + self.zero.unsqueeze(-1)).clamp(*self.config.codes).to(torch.int16).flatten(1)
        low, dtype = self.config.codes[0], self.dtype
        return Affine(codes, self._scale().to(dtype), self.zero.to(dtype), self.config.bits, low)

    def begin(self, progress: float) -> None:
        """The slope and β of this step."""
        self.progress = progress

    def penalty(self) -> Tensor | None:
        """λ R; None where it is off."""
        if self.config.variable != "adaround" or self.progress < WARM or not self.config.penalty:
            return None
        beta = LAST + (FIRST - LAST) * (1 - (self.progress - WARM) / (1 - WARM))
        return self.config.penalty * (1 - (2 * self.shares() - 1).abs().pow(beta)).mean()

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Scales have a rate of their own."""
        return [(1.0, [self.variable]), (min(1.0, SCALE_RATE / (self.config.first_rate or 1.0)), [self.scale_log])]

    def _start(self) -> Tensor:
        share = self.steps - self.steps.floor()
        if self.config.variable == "straight-through":
            return torch.zeros_like(share)
        stretch = STRETCH if self.config.variable == "adaround" else 0.0
        # σ(V) = share at the ends of a plain sigmoid is infinitely far
        return ((share + stretch) / (1 + 2 * stretch)).logit(eps=1e-3)

    def _scale(self) -> Tensor:
        scale = self.scale * self.scale_log.exp()
        return scale if self.dtype == torch.float32 else through(scale, scale.to(self.dtype).float())

    def _weight(self, steps: Tensor) -> Tensor:
        codes = (steps + self.zero.unsqueeze(-1)).clamp(*self.config.codes)
        return ((codes - self.zero.unsqueeze(-1)) * self._scale().unsqueeze(-1)).flatten(1)


def importance(weight: Tensor, packed: Packed | Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """What quantising each row costs the task's loss, by its Taylor expansion.

    Args:
        weight: (out, in).
        packed: what it becomes, (out, in).
        gradient: (out, in), the mean gradient of the loss; zeros where the loss is a divergence from the model itself.
        fisher: (out, in), the mean squared gradient.

    Returns:
        (out,) float64, in units of the loss; a layer's is the sum.

    Raises:
        RecipeError: shapes differ.

    Source: reconstructed from arXiv:2308.07662's abstract.

    >>> importance(torch.ones(1, 2), torch.tensor([[1.5, 1.0]]), torch.full((1, 2), -2.0), torch.full((1, 2), 4.0)).tolist()
    [1.5]
    """
    new = packed.dequantize() if isinstance(packed, Packed) else packed
    if weight.dim() != 2 or not weight.shape == new.shape == gradient.shape == fisher.shape:
        raise RecipeError(
            f"A weight {list(weight.shape)}, what it becomes {list(new.shape)}, gradient {list(gradient.shape)} and Fisher "
            f"{list(fisher.shape)} must be matrices of one shape."
        )
    delta = new.double() - weight.double()
    return ((gradient.double() * delta).abs() + fisher.double() * delta.square() / 2).sum(1)


METHODS = (
    QuantizeMethod(
        name="gradient_ptq",
        family="quantize",
        config=GradientPTQ,
        summary="Reconstruct blocks with chosen variables, losses, optimizers and degrees of freedom.",
        goal="shrink",
        paper="gradient-ptq",
        needs="calibration",
        defaults={"scales": True, "biases": True},
        checked_by=("brute force", "autograd"),
        codes=lambda config: config.codes,
        error=0.1,
        finer={"bits": (2, 3, 4, 8)},
        refits="grids are fitted anew, and the lowest or the highest code may be unused",
        trial={"steps": 8},
    ),
    QuantizeMethod(
        name="adaround",
        family="quantize",
        config=GradientPTQ,
        summary="Learn whether each weight is rounded up or down, so that a block's outputs stay.",
        goal="shrink",
        origin="AdaRound, Nagel et al. 2020, arXiv:2004.10568",
        needs="calibration",
        checked_by=("brute force", "autograd"),
        codes=lambda config: config.codes,
        error=0.1,
        finer={"bits": (2, 3, 4, 8)},
        refits="grids are fitted anew, and the lowest or the highest code may be unused",
        trial={"steps": 8},
    ),
)
