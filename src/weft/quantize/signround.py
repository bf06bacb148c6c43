"""Learn which way each weight is rounded and where each group is clipped, by steps along the sign of the gradient.

Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs (SignRound, AutoRound), Cheng et al.,
arXiv:2309.05516 (2023).

    Ŵ = s · (clamp( round(W / s + V) + z, low, high ) − z),          V (out, in) in [−½, ½]
    asymmetric:  s = (β max(W, 0) − α min(W, 0)) / (2ᵇ − 1),   z = round(−α min(W, 0) / s)
    symmetric:   s = 2 max(β max(W, 0), −α min(W, 0)) / (2ᵇ − 1)  (narrow: without the 2, over 2ᵇ⁻¹ − 1),   z = 0

α and β (out, groups) in [0, 1] shrink the range of a group. V starts at 0 and α and β at 1: rounding to nearest. With
rounding passed straight through, all are trained on Σ ‖y − t‖² of a block's outputs by

    θ ← θ − η_t sign(∂L/∂θ),          η_t falls linearly from 1 / steps to 0

so that V travels ½ at most and can reach either neighbour of every weight, whatever the gradient's size.

Differences from the paper and its code: V is kept in its bounds after each step. The state that is kept is the best on
samples that are held out, not on a mini-batch. Symmetric grids are those of this package.
Complexity: as many numbers to train as weights, without state of the optimizer.
Re-implemented from the equations (official code: Apache-2.0).
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
class SignRound(Grid, Reconstruction):
    """A grid, and how rounding is trained.

    >>> SignRound(bits=2, group_size=32).steps
    200
    """

    steps: int = parameter(200, "gradient steps for each block", minimum=0)
    rate: float = parameter(0.0, "learning rate of the first step; 0 is 1 / steps", minimum=0)
    samples: int = parameter(8, "sequences in a mini-batch", minimum=1)
    clip: bool = parameter(True, "train the ranges of groups too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0 or self.samples < 1 or not self.rate >= 0:
            raise RecipeError(
                f"SignRound needs steps and rate ≥ 0 and samples ≥ 1, got steps={self.steps!r}, rate={self.rate!r} and "
                f"samples={self.samples!r}."
            )

    def soft(self, weight: Tensor, generator: torch.Generator) -> SignRounding:
        """Rounding offsets and ranges of a matrix; nothing is drawn."""
        return SignRounding(weight, self, self.clip)

    def descent(self) -> Descent:
        """Steps along the sign, with a linear decay."""
        return Descent(self.steps, self.rate or 1 / max(1, self.steps), "sign", "linear", self.samples)

    def without_data(self) -> RTN:
        """Rounding to nearest on the same grid."""
        return nearest_of(self)


class SignRounding(Soft):
    """The weights of one layer, moved by less than a step of the grid and rounded.

    Args:
        weight: (out, in).
        grid: bits, groups, kind.
        clip: whether α and β are trained.

    Attributes:
        offset: (out, in), V.
        lower, upper: (out, groups), α and β.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite.

    Source: arXiv:2309.05516, equations 3 and 4.

    >>> soft = SignRounding(torch.tensor([[0.0, 0.9, 2.1, 3.0]]), Grid(bits=2, group_size=0))
    >>> soft().tolist()
    [[0.0, 1.0, 2.0, 3.0]]
    """

    groups: Tensor
    smallest: Tensor
    largest: Tensor

    def __init__(self, weight: Tensor, grid: Grid, clip: bool = True):
        super().__init__()
        scale, _ = fit_grid(weight, grid)
        self.grid, self.dtype = grid, scale.dtype
        groups = weight.detach().float().contiguous().unflatten(1, (scale.shape[1], -1))
        self.register_buffer("groups", groups)  # (out, groups, group_size)
        smallest, largest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        whole = self._scale(smallest, largest)[1].to(scale)
        # a grid that was fitted to less than the range starts there
        share = torch.where(whole == scale, 1, scale.float() / whole.float())
        self.register_buffer("smallest", smallest * share)
        self.register_buffer("largest", largest * share)
        self.offset = nn.Parameter(torch.zeros_like(groups))
        self.lower = nn.Parameter(torch.ones_like(self.smallest), requires_grad=clip)
        self.upper = nn.Parameter(torch.ones_like(self.largest), requires_grad=clip)

    def forward(self) -> Tensor:
        """Ŵ (out, in), float32."""
        scale, zero, codes = self._codes()
        return ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)

    @torch.no_grad()
    def packed(self) -> Affine:
        """Codes, scales and zero points."""
        scale, zero, codes = self._codes()
        low, dtype = self.grid.codes[0], self.dtype
        return Affine(codes.to(torch.int16).flatten(1), scale.to(dtype), zero.to(dtype), self.grid.bits, low)

    def project(self) -> None:
        """V into [−½, ½], α and β into [0, 1]."""
        self.offset.clamp_(-0.5, 0.5)
        self.lower.clamp_(0, 1)
        self.upper.clamp_(0, 1)

    def _codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scales and zero points (out, groups), and codes (out, groups, group_size)."""
        low, high = self.grid.codes
        smallest, largest = self.lower * self.smallest, self.upper * self.largest
        scale = through(*self._scale(smallest, largest))
        zero = torch.zeros_like(scale)
        if self.grid.kind == "asymmetric":
            ratio = -smallest / scale
            zero = through(ratio, ratio.round()).clamp(low, high)
        steps = self.groups / scale.unsqueeze(-1) + self.offset
        return scale, zero, (through(steps, steps.round()) + zero.unsqueeze(-1)).clamp(low, high)

    def _scale(self, smallest: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Of a range: exactly, and as it is stored; float32."""
        low, high = self.grid.codes
        if self.grid.kind == "asymmetric":
            exact = (largest - smallest) / high
        else:
            exact = torch.maximum(largest, -smallest) / (high if self.grid.kind == "narrow" else (high - low) / 2)
        return exact, exact.to(self.dtype).clamp(min=torch.finfo(self.dtype).tiny).float()


METHODS = (
    QuantizeMethod(
        name="signround",
        family="quantize",
        config=SignRound,
        summary="Learn the rounding of weights and the ranges of groups by signed gradient steps (AutoRound).",
        goal="shrink",
        origin="SignRound, Cheng et al. 2023, arXiv:2309.05516",
        needs="calibration",
        checked_by=("brute force", "autograd"),
        codes=lambda config: config.codes,
        error=0.1,
        finer={"bits": (2, 3, 4, 8)},
        refits="grids are fitted anew, and the lowest or the highest code may be unused",
        trial={"steps": 8},
    ),
)
