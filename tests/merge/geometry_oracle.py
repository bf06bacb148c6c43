"""What the tests of geometric merges share: inputs of odd shapes, and how far float32 may be from float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# a scalar, one element, odd sizes, rows of one element, more than two axes, no rows, more than one chunk
SHAPES = [(), (1,), (3,), (5, 7), (4, 1), (2, 3, 5), (0, 4), (70, 2003)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = 2.0**-24  # relative error of one float32 rounding
_OUTPUT_UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def draw(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """Correlated random tensors, of different lengths."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=random)
    return [((i + 1) * (0.5 * common + torch.randn(shape, generator=random))).to(dtype) for i in range(count)]


def exact(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    """The same values in float64."""
    return [t.double().numpy() for t in tensors]


def assert_rounds_to(result: torch.Tensor, expected: np.ndarray, scale: Any, roundings: int = 8) -> None:
    """``result`` is ``expected`` up to ``roundings`` of float32 at ``scale``, and one of its own dtype."""
    found = result.double().numpy()
    assert found.shape == expected.shape
    # the last term: float16 has no numbers between 0 and its smallest subnormal, 2^-24
    allowed = (
        roundings * UNIT * scale
        + _OUTPUT_UNIT[result.dtype] * abs(expected)
        + 2.0**-25 * (result.dtype == torch.float16)
    )
    worst = np.max(abs(found - expected) - allowed, initial=0)
    assert worst <= 0, f"off by {worst:.3g} more than rounding explains"
