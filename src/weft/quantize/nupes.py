"""Learn the codes of powers of weights, and the exponent, so that a block's outputs stay.

NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search, Yvinec et al., arXiv:2308.05600 (2023).

    Ŵ = sign(code) (|code| / q)^{1/a} · m,          code = clamp(round(v), −q, q),          q = 2ᵇ⁻¹ − 1

It begins where :mod:`weft.quantize.powerquant` ends: v (out, in) is q sign(w) (|w| / m)ᵃ, with m the largest |w| of a group,
and a the exponent of least error. Then v, over its whole range, and log a are trained on Σ ‖y − t‖² of the block's outputs
(:mod:`weft.quantize.reconstruct`), with rounding passed straight through. With t = |code| / q

    ∂Ŵ/∂a = − sign(code) m t^{1/a} ln t / a²  (0 at code 0)        ∂Ŵ/∂v = m / (a q) · max(t, 1/2q)^{1/a − 1}

which are bounded: t^{1/a} |ln t| ≤ a / e. a stays within 0.2 … 1.5 and is frozen after a part of the steps.

Differences from the paper: the details of the training (optimizer, rates, when the exponent is frozen, the bound at 1/2q) are a
reconstruction, as there is no official code. Weights alone are quantised.
Complexity: as many numbers to train as weights, with two more each for Adam.
Re-implemented from the equations (no official code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate import Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Lookup
from weft.quantize.powerquant import (
    LEAST,
    MOST,
    PowerQuant,
    code_limit,
    on_grid,
    power_exponents,
    power_lookup,
    power_parts,
)
from weft.quantize.reconstruct import Reconstruction
from weft.quantize.soft import Descent, Soft, through


@dataclass(frozen=True)
class NUPES(PowerQuant, Reconstruction):
    """Bits, groups, the first exponent, and how codes are trained.

    >>> NUPES(bits=3).steps
    400
    """

    steps: int = parameter(400, "gradient steps for each block", minimum=0)
    rate: float = parameter(1e-3, "learning rate of codes; that of the exponent is a tenth", minimum=0)
    samples: int = parameter(8, "sequences in a mini-batch", minimum=1)
    learned: float = parameter(0.5, "part of the steps after which the exponent is frozen", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0 or self.samples < 1 or not self.rate >= 0 or not 0 <= self.learned <= 1:
            raise RecipeError(
                f"NUPES needs steps and rate ≥ 0, samples ≥ 1 and learned from 0 to 1, got steps={self.steps!r}, "
                f"rate={self.rate!r}, samples={self.samples!r} and learned={self.learned!r}."
            )

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Any:
        """One layer from the Gram matrix of its inputs; see :class:`weft.calibrate.Change`."""
        return Reconstruction.fit(self, name, weight, statistics)

    def soft(self, weight: Tensor, generator: torch.Generator) -> PowerCodes:
        """Codes and exponents of a matrix; nothing is drawn."""
        return PowerCodes(weight, self, self.learned)

    def descent(self) -> Descent:
        """Adam, with a cosine to zero."""
        return Descent(self.steps, self.rate, "adam", "cosine", self.samples)

    def without_data(self) -> PowerQuant:
        """PowerQuant with the same bits, groups and exponent."""
        return PowerQuant(self.bits, self.group_size, self.exponent, self.unit)


class PowerCodes(Soft):
    """The codes of one layer, and their exponents.

    Args:
        weight: (out, in).
        config: bits, groups, the first exponent.
        learned: share of the steps in which the exponent is trained.

    Attributes:
        code: (out, groups, group_size), v.
        exponent_log: (out, 1, 1) or (1, 1, 1), log a.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite.

    Source: arXiv:2308.05600; reconstructed from its description.

    >>> weight = torch.tensor([[1.0, -0.25, 0.1]])
    >>> soft = PowerCodes(weight, PowerQuant(bits=3, exponent=0.5))
    >>> torch.allclose(soft(), soft.packed().dequantize())
    True
    """

    largest: Tensor
    first: Tensor

    def __init__(self, weight: Tensor, config: PowerQuant, learned: float = 0.5):
        super().__init__()
        self.config, self.learned = config, learned
        unit, largest = power_parts(weight, config)
        exponent = power_exponents(unit, largest, config)
        self.register_buffer("largest", largest)
        self.register_buffer("first", exponent)
        self.code = nn.Parameter(unit.sign() * unit.abs().pow(exponent) * code_limit(config.bits))
        self.exponent_log = nn.Parameter(torch.zeros_like(exponent))  # of what the first is multiplied by

    def forward(self) -> Tensor:
        """Ŵ (out, in), float32."""
        q = code_limit(self.config.bits)
        codes = through(self.code, self.code.round()).clamp(-q, q)
        return (_Power.apply(codes / q, self.exponent(), q) * self.largest).flatten(1)

    @torch.no_grad()
    def packed(self) -> Lookup:
        """Tables of the present exponents, and the codes."""
        q = code_limit(self.config.bits)
        return power_lookup(self.code.round().clamp(-q, q), self.largest, self.exponent(), self.config)

    def exponent(self) -> Tensor:
        """a, of each row or of the matrix."""
        exponent = self.first * self.exponent_log.exp()
        return through(exponent, on_grid(exponent)) if self.config.unit == "row" else exponent

    def begin(self, progress: float) -> None:
        """Freeze the exponent."""
        self.exponent_log.requires_grad_(progress < self.learned)

    def project(self) -> None:
        """a within its bounds."""
        low, high = (LEAST / self.first).log(), (MOST / self.first).log()
        self.exponent_log.copy_(self.exponent_log.clamp(min=low, max=high))

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Exponents learn at a tenth of the codes' rate."""
        return [(1.0, [self.code]), (0.1, [self.exponent_log])]


class _Power(torch.autograd.Function):
    """sign(t) |t|^{1/a}, with gradients that are bounded at t = 0."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, exponent: Tensor, q: int) -> Tensor:
        ctx.save_for_backward(t, exponent)
        ctx.q = q
        return t.sign() * t.abs().pow(1 / exponent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        t, exponent = ctx.saved_tensors
        size = t.abs().clamp(min=1 / (2 * ctx.q))
        by_t = size.pow(1 / exponent - 1) / exponent
        by_a = -t.sign() * size.pow(1 / exponent) * size.log() / exponent.square()
        return gradient * by_t, (gradient * by_a).sum_to_size(exponent.shape), None


METHODS = (
    QuantizeMethod(
        name="nupes",
        family="quantize",
        config=NUPES,
        summary="Learn the codes of powers of weights, and the exponent, so that a block's outputs stay.",
        goal="shrink",
        paper="nupes",
        needs="calibration",
        checked_by=("brute force", "autograd"),
        codes=lambda config: (0, (1 << config.bits) - 2),
        error=0.122,
        finer={"bits": (2, 3, 4, 8)},
        refits="the exponent is searched anew",
        trial={"steps": 8},
    ),
)
