"""Four-bit floating-point weights with compensation and a low-rank patch for what is lost, for inputs in eight bits.

ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats, Wu et al.,
arXiv:2307.09782 (2023); the patch, LoRC, is from ZeroQuant-V2, Yao et al., arXiv:2303.08302.

    Ŵ = S_g · nearest(W / S_g + compensation) + L R          W (out, in); L (out, r), R (r, in)

Numbers, scales S_g and their constraints are those of :mod:`weft.quantize.floating_point`. With ``compensate``, columns make
up for the errors of earlier ones as in GPTQ (:mod:`weft.quantize.gptq`). What is lost is patched by rank r
(:mod:`weft.quantize.low_rank_patch`): in the plain way, or weighted by the Gram matrix of the inputs, which has the least
error of outputs that any patch of that rank has. Inputs are rounded to e4m3, token by token.

Differences from the paper: the weighted patch is added, and the default. A patch is in bfloat16, not in 8 bits. Columns are
rounded by falling diagonal of the Gram matrix.
Complexity: that of GPTQ and of the patch.
Re-implemented from the equations (no official code for these parts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.calibrate import Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import LowRank, Minifloat, Packed
from weft.packed.levels import minifloat_levels
from weft.quantize.compensate import round_columns
from weft.quantize.floating_point import (
    INPUTS,
    KINDS,
    FloatingPoint,
    float_codes,
    float_scales,
    nearest_codes,
    with_inputs,
)
from weft.quantize.gptq import GPTQ, gptq_factor
from weft.quantize.low_rank_patch import low_rank_patch

PATCHES = ("gram", "plain")
BLOCK = 128  # columns that are rounded before the rest is updated; for speed only


@dataclass(frozen=True)
class ZeroQuantFP(FloatingPoint):
    """Which numbers, their scales, compensation and the patch.

    >>> ZeroQuantFP(constraint="m2", rank=16).kind
    'e2m1'
    """

    kind: str = parameter("e2m1", "of numbers: e2m1, e3m0 or e4m3", choices=KINDS)
    group_size: int = parameter(128, "inputs that share a scale; 0 for whole rows", minimum=0)
    activations: str = parameter("e4m3", "what inputs are rounded to: none or e4m3", choices=INPUTS)
    compensate: bool = parameter(True, "let later columns make up for the errors of earlier ones")
    damping: float = parameter(0.01, "added to the Gram matrix' diagonal, as a share of its mean", minimum=0)
    rank: int = parameter(8, "of the patch; 0 for none", minimum=0)
    patch: str = parameter("gram", "what the patch is nearest in: gram (outputs) or plain (weights)", choices=PATCHES)

    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0 or self.patch not in PATCHES or not 0 <= self.damping < float("inf"):
            raise RecipeError(
                f"A patch is {' or '.join(PATCHES)} with a rank ≥ 0, and damping is ≥ 0; got {self.patch!r}, {self.rank!r} "
                f"and {self.damping!r}."
            )

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Packed:
        """A layer's codes and patch; see :class:`weft.calibrate.Change`."""
        return zeroquant_codes(weight, statistics.gram(name), self)

    def without_data(self) -> FloatingPoint:
        """The nearest numbers on the same scales, without a patch."""
        return FloatingPoint(self.kind, self.group_size, self.constraint, self.activations)


def zeroquant_codes(weight: Tensor, gram: Tensor, config: ZeroQuantFP | None = None) -> Packed:
    """Numbers, with compensation and patch as configured.

    Args:
        weight: (out, in).
        gram: (in, in), Σ xᵀx of the layer's inputs; (groups, in, in) of a convolution with groups, which gets no patch.
        config: the defaults if None.

    Raises:
        RecipeError: shapes do not fit, values are not finite, or rows do not divide into groups.

    Source: arXiv:2307.09782, section 3.

    >>> made = zeroquant_codes(torch.randn(8, 32), torch.eye(32), ZeroQuantFP(group_size=16, rank=2))
    >>> made.settings()["form"], made.settings()["inner"]["form"]
    ('activations', 'low-rank')
    """
    config = config or ZeroQuantFP()
    scale = float_scales(weight, config)
    w = weight.detach().float().contiguous()
    stack = gram.detach() if gram.dim() == 3 else gram.detach().unsqueeze(0)
    if stack.dim() != 3 or len(w) % max(1, len(stack)) or stack.shape[1:] != 2 * w.shape[1:]:
        raise RecipeError(f"A weight {list(w.shape)} needs a Gram matrix of its inputs, got {list(gram.shape)}.")
    made = float_codes(w, scale, config.kind)
    if config.compensate:
        parts = [_compensated(p, s, g, config) for p, s, g in zip(w.chunk(len(stack)), scale.chunk(len(stack)), stack)]
        made = Minifloat(torch.cat(parts), scale, config.kind, made.block)
    rank = min(config.rank, *w.shape)
    if not rank or len(stack) > 1:
        return with_inputs(made, config.activations)
    left, right = low_rank_patch(w - made.dequantize(), rank, stack[0] if config.patch == "gram" else None)
    patched = LowRank(made, left.to(torch.bfloat16), right.to(torch.bfloat16))
    return with_inputs(patched, config.activations)


def _compensated(w: Tensor, scale: Tensor, gram: Tensor, config: ZeroQuantFP) -> Tensor:
    """Codes (out, in) of the columns in GPTQ's loop."""
    held = gptq_factor(gram, GPTQ(group_size=0, damping=config.damping))
    if held.upper is None:
        return float_codes(w, scale, config.kind).codes
    order = held.order.to(w.device)
    columns = w.T[order].contiguous()  # (in, out)
    groups = order // (w.shape[1] // scale.shape[1])
    levels = minifloat_levels(config.kind).to(w.device)
    codes = torch.empty_like(columns, dtype=torch.uint8)

    def round_column(j: int) -> Tensor:
        s = scale[:, int(groups[j])]
        codes[j] = nearest_codes(columns[j] / s, config.kind)
        return levels[codes[j].long()] * s

    size = len(order)
    round_columns(
        columns, held.upper.to(columns), [(i, min(i + BLOCK, size)) for i in range(0, size, BLOCK)], round_column
    )
    return codes[order.argsort()].T.contiguous()


METHODS = (
    QuantizeMethod(
        name="zeroquant_fp",
        family="quantize",
        config=ZeroQuantFP,
        summary="Four-bit floating point with GPTQ's compensation and a low-rank patch, for inputs in FP8.",
        goal="shrink",
        paper="zeroquant-fp",
        needs="calibration",
        checked_by=("brute force", "closed form"),
        error=0.1,
        finer={"kind": ("e3m0", "e2m1", "e4m3"), "rank": (1, 4, 8)},
        refits="the patch moves weights off the numbers",
    ),
)
