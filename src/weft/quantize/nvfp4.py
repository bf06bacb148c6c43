"""Store weights as e2m1 numbers of four bits, with a scale in eight bits for sixteen of them and one for the whole: no data.

NVFP4: Pretraining Large Language Models with NVFP4, NVIDIA, arXiv:2509.25149 (2025). W (out, in) in groups g of 16 inputs of
a row:

    u = max|W| / (448 · 6)                     the global scale, float32
    s_g = e4m3(max|W_g| / (6 u))               at most 448, the largest number e4m3
    Ŵ = s_g u · nearest(W / (s_g u))           nearest of 0, ½, 1, 1½, 2, 3, 4, 6 with a sign, to the even of two as near

Programs that make one layer of several (q, k and v; gate and up) take one global scale for them, so the largest of theirs is
taken for all where a whole block is quantised.

Differences from the paper and its code: files hold 1 / u in float32, and u is what that stands for. A scale that would be 0
is 0.125: every number of its group is 0 then.
Complexity: O(out · in).
Re-implemented from the equations (compressed-tensors, Apache-2.0, is compared with bit for bit).
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
from weft.packed import Minifloat
from weft.packed.levels import nvfp4_scales
from weft.quantize.floating_point import nearest_codes
from weft.quantize.fused import fused_layers
from weft.quantize.grid import checked

TOP = 448.0 * 6.0  # the largest scale times the largest number


@dataclass(frozen=True)
class NVFP4(Change):
    """The groups.

    >>> NVFP4()
    NVFP4(group_size=16)
    """

    group_size: int = parameter(16, "inputs that share a scale; the files of NVFP4 have 16", minimum=1)

    file_format: ClassVar[str] = "nvfp4-pack-quantized"

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise RecipeError(f"A group has at least one input; got group_size={self.group_size!r}.")

    def nominal_bits(self, rows: int, columns: int) -> float:
        """Bits a weight in files: four, and a share of a scale."""
        return 4 + 8 / self.group_size

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Minifloat:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        return nvfp4_codes(weight, self.group_size)

    def change_block(self, task: BlockTask) -> None:
        """Layer by layer, with one global scale for those that become one layer."""
        largest = {name: task.weight(name).abs().max() for name in task.layers}
        for names in fused_layers(task.layers):
            most = torch.stack([largest[n] for n in names]).max()
            largest |= dict.fromkeys(names, most)
        for name in task.layers:
            with task.attempt(name):
                task.put(name, nvfp4_codes(task.weight(name), self.group_size, largest[name]))


def global_scale(largest: Tensor) -> Tensor:
    """What the scales of groups are multiples of, so that the largest is 448: 0-d float64 whose inverse is a float32.

    >>> float(global_scale(torch.tensor(2688.0)))
    1.0
    """
    divisor = (TOP / largest.float().clamp(min=torch.finfo(torch.float32).tiny)).float()
    return 1 / torch.where(divisor.isfinite(), divisor, 1.0).double().reshape(())


def nvfp4_codes(weight: Tensor, group_size: int = 16, largest: Tensor | None = None) -> Minifloat:
    """The nearest numbers.

    Args:
        weight: (out, in).
        group_size: inputs that share a scale.
        largest: 0-d, what the global scale is fitted to; the weight's largest size if None.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite.

    Source: arXiv:2509.25149.

    >>> weight = torch.zeros(1, 16)
    >>> weight[0, :3] = torch.tensor([6.0, 2.4, -0.7])
    >>> nvfp4_codes(weight).dequantize()[0, :4].tolist()
    [6.0, 2.0, -0.5, 0.0]
    """
    weight = checked(weight).float()
    if weight.shape[1] % group_size:
        raise RecipeError(
            f"Rows of {weight.shape[1]} inputs do not divide into groups of {group_size}; leave these layers out with where, "
            "or take a scheme of whole rows such as FP8_DYNAMIC."
        )
    groups = weight.unflatten(1, (-1, group_size))
    size = groups.abs().amax(-1)
    unit = global_scale(size.max() if largest is None else largest)
    scale = nvfp4_scales(size, unit)
    step = (scale.double() * unit).float().unsqueeze(-1)
    codes = nearest_codes(groups / step, "e2m1").flatten(1)
    return Minifloat(codes, scale.to(torch.float8_e4m3fn), "e2m1", (1, group_size), unit)


METHODS = (
    QuantizeMethod(
        name="nvfp4",
        family="quantize",
        config=NVFP4,
        summary="Four bits: a floating-point number e2m1, a scale in eight bits for sixteen, and one for all; no data.",
        goal="shrink",
        origin="NVFP4, NVIDIA 2025, arXiv:2509.25149",
        checked_by=("brute force", "compressed-tensors"),
        error=0.095,
        finer={"group_size": (256, 32, 4)},
    ),
)
