"""Divide every weight by a number of its own before it is rounded, and learn these numbers from a block's outputs.

FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization, Lee et al., arXiv:2306.00317
(ICML 2023); LRQ: Optimizing Post-Training Quantization for Large Language Models by Learning Low-Rank Weight-Scaling
Matrices, Lee et al., arXiv:2407.11534.

    Ŵ = s · (clamp( round( W / (s ⊙ S₂ ⊙ s₃) ) + z, low, high ) − z)          all divisors positive

W is (out, in); s (out, groups) the grid's scale, which is trained and multiplies the result too; S₂ (out, in) and s₃
(out, 1) only divide; z (out, groups) is that of the fitted grid (:mod:`weft.quantize.grid`). Everything starts as rounding to
nearest. Logarithms are trained, s = s₀ e^{δ₁}, S₂ = e^{δ₂}, s₃ = e^{δ₃}; with rounding passed straight through, and inside
of the clamp

    ∂L/∂δ₂ = − W / (S₂ s₃) ⊙ ∂L/∂Ŵ          ∂L/∂δ₁ = Σ (Ŵ − W / (S₂ s₃)) ∂L/∂Ŵ

so that large weights move easily, over several steps of the grid, and a weight that is zero stays. With ``rank`` r > 0, S₂ is
that of LRQ, where that saves numbers: δ₂ = L U + r₂ + c₂ with L (out, r) from zeros, U (r, in) drawn, and one number for
each row and column.

The loss is Σ ‖y − t‖² of the block's outputs (:mod:`weft.quantize.reconstruct`), the optimizer Adam with a cosine to zero.

Differences from the paper and its code: scales of any group size. The code divides the loss by tokens of a sequence only.
Its mixing of quantised and original inputs is left out: inputs are those of the quantised blocks before. Steps are fewer by
default, and longer (the code makes 5000 with a rate of 3e-3 at 4 bits). The start is kept where nothing better was found on
samples that are held out.
Complexity: as many numbers to train as weights, with two more each for Adam; with ``rank`` r · (out + in).
Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Affine
from weft.quantize.grid import Grid, fit_grid
from weft.quantize.reconstruct import Reconstruction, nearest_of
from weft.quantize.rtn import RTN
from weft.quantize.soft import Descent, Soft, through


@dataclass(frozen=True)
class FlexRound(Grid, Reconstruction):
    """A grid, and how divisors are trained.

    >>> FlexRound(bits=3, group_size=0, rank=64).steps
    400
    """

    steps: int = parameter(400, "gradient steps for each block", minimum=0)
    rate: float = parameter(1e-2, "learning rate of the logarithms", minimum=0)
    samples: int = parameter(8, "sequences in a mini-batch", minimum=1)
    rank: int = parameter(0, "of the divisors' logarithms (LRQ); 0: each weight has its own", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0 or self.samples < 1 or self.rank < 0 or not self.rate >= 0:
            raise RecipeError(
                f"FlexRound needs steps, rank and rate ≥ 0 and samples ≥ 1, got steps={self.steps!r}, rank={self.rank!r}, "
                f"rate={self.rate!r} and samples={self.samples!r}."
            )

    def soft(self, weight: Tensor, generator: torch.Generator) -> FlexRounding:
        """Divisors of a matrix, all one."""
        return FlexRounding(weight, self, self.rank, generator)

    def descent(self) -> Descent:
        """Adam, with a cosine to zero."""
        return Descent(self.steps, self.rate, "adam", "cosine", self.samples)

    def without_data(self) -> RTN:
        """Rounding to nearest on the same grid."""
        return nearest_of(self)


class FlexRounding(Soft):
    """The weights of one layer, divided and rounded.

    Args:
        weight: (out, in).
        grid: bits, groups, kind.
        rank: of the divisors' logarithms; 0, or one that saves no numbers, for full.
        generator: of U, with a rank.

    Attributes:
        scale_log: (out, groups), δ₁.
        row_log: (out, 1), δ₃.
        divisor_log: (out, in), δ₂; None with a rank.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite.

    Source: arXiv:2306.00317, equations 2 and 4; arXiv:2407.11534, equation 2 for the rank.

    >>> soft = FlexRounding(torch.tensor([[0.0, 0.9, 2.1, 3.0]]), Grid(bits=2, group_size=0))
    >>> soft().tolist(), soft.packed().dequantize().tolist()
    ([[0.0, 1.0, 2.0, 3.0]], [[0.0, 1.0, 2.0, 3.0]])
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, grid: Grid, rank: int = 0, generator: torch.Generator | None = None):
        super().__init__()
        scale, zero = fit_grid(weight, grid)
        self.grid, self.dtype = grid, scale.dtype
        out, columns = weight.shape
        self.register_buffer("weight", weight.detach().float().contiguous())
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero", zero.float())
        self.scale_log = nn.Parameter(torch.zeros_like(self.scale))
        self.row_log = nn.Parameter(weight.new_zeros(out, 1, dtype=torch.float32))
        self.divisor_log: nn.Parameter | None = None
        if not 0 < rank * (out + columns) < out * columns:
            self.divisor_log = nn.Parameter(torch.zeros_like(self.weight))
            return
        drawn = torch.empty(rank, columns)
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        self.left = nn.Parameter(torch.zeros(out, rank, device=weight.device))
        self.right = nn.Parameter(drawn.to(weight.device))
        self.rows = nn.Parameter(torch.zeros(out, 1, device=weight.device))
        self.columns = nn.Parameter(torch.zeros(1, columns, device=weight.device))

    def forward(self) -> Tensor:
        """Ŵ (out, in), float32."""
        scale, codes = self._codes()
        return ((codes - self.zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)

    @torch.no_grad()
    def packed(self) -> Affine:
        """Codes in the range of the grid, with the trained scales and the first zero points."""
        scale, codes = self._codes()
        low, dtype = self.grid.codes[0], self.dtype
        return Affine(codes.to(torch.int16).flatten(1), scale.to(dtype), self.zero.to(dtype), self.grid.bits, low)

    def divisors(self) -> Tensor:
        """S₂ ⊙ s₃, (out, in)."""
        if self.divisor_log is not None:
            return (self.divisor_log + self.row_log).exp()
        return (self.left @ self.right + self.rows + self.columns + self.row_log).exp()

    def _codes(self) -> tuple[Tensor, Tensor]:
        """Scales (out, groups) as they are stored, and codes (out, groups, group_size)."""
        scale = self.scale * self.scale_log.exp()
        if self.dtype != torch.float32:
            scale = through(scale, scale.to(self.dtype).float())
        steps = (self.weight / self.divisors()).unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1)
        return scale, (through(steps, steps.round()) + self.zero.unsqueeze(-1)).clamp(*self.grid.codes)


METHODS = (
    QuantizeMethod(
        name="flexround",
        family="quantize",
        config=FlexRound,
        summary="Divide every weight by a learned number before rounding it, so that a block's outputs stay.",
        goal="shrink",
        paper="flexround",
        needs="calibration",
        checked_by=("brute force", "autograd"),
        codes=lambda config: config.codes,
        error=0.1,
        finer={"bits": (2, 3, 4, 8)},
        refits="grids are fitted anew, and the lowest or the highest code may be unused",
        trial={"steps": 8},
    ),
    QuantizeMethod(
        name="lrq",
        family="quantize",
        config=FlexRound,
        summary="FlexRound with divisors of low rank, which take less memory and overfit less.",
        goal="shrink",
        origin="LRQ, Lee et al. 2024, arXiv:2407.11534",
        needs="calibration",
        defaults={"rank": 64},
        checked_by=("brute force", "autograd"),
        codes=lambda config: config.codes,
        error=0.1,
        finer={"bits": (2, 3, 4, 8)},
        refits="grids are fitted anew, and the lowest or the highest code may be unused",
        trial={"steps": 8, "rank": 4},
    ),
)
