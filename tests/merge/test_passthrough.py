"""Passthrough: one model, scaled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from geometry_oracle import DTYPES, SHAPES, draw

from weft.engine.merging import merge_tensors
from weft.errors import CheckpointError, RecipeError
from weft.merge.passthrough import METHODS, passthrough


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_copies_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (tensor,) = draw(shape, 1, dtype)
    copy = passthrough(tensor)
    assert copy.dtype == dtype
    assert torch.equal(copy, tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_scales_with_one_rounding_of_the_product(dtype: torch.dtype, scale: float) -> None:
    (tensor,) = draw((5, 7), 1, dtype)
    assert torch.equal(passthrough(tensor, scale=scale), (tensor.float() * scale).to(dtype))


def test_the_scale_may_belong_to_the_model() -> None:
    config = METHODS[0].configure({"scale": [2.0]})
    assert merge_tensors(METHODS[0], [np.ones(2, np.float32)], config).tolist() == [2, 2]
    assert METHODS[0].parameters["scale"].per_model == "scale"


def test_one_model_of_floating_point() -> None:
    with pytest.raises(RecipeError, match="exactly 1"):
        METHODS[0].check_models(2, False)
    with pytest.raises(RecipeError, match="2 values"):
        merge_tensors(METHODS[0], [np.ones(2, np.float32)], METHODS[0].configure({"scale": [1.0, 2.0]}))
    with pytest.raises(CheckpointError, match="I32"):
        passthrough(np.arange(3, dtype=np.int32))
