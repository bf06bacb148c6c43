import pytest
import torch
from torch import nn

import weft
from weft.errors import RecipeError, ShapeError
from weft.normalize import WeightStandardization, fold_affine, fold_into_


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_folded_layer_reads_plain_features(bias: bool, shifted: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 3, bias=bias).double()
    scale, shift, x = (torch.randn(5, dtype=torch.float64) for _ in range(3))
    expected = linear(x * scale + (shift if shifted else 0))
    fold_into_(linear, scale, shift if shifted else None)
    torch.testing.assert_close(linear(x), expected)
    assert (linear.bias is not None) == (bias or shifted)


def test_half_precision_is_rounded_once() -> None:
    weight, scale = torch.randn(4, 6, dtype=torch.bfloat16), torch.randn(6)
    made, _ = fold_affine(weight, None, scale)
    assert torch.equal(made, (weight.double() * scale.double()).to(torch.bfloat16))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="scale of 4 features"):
        fold_into_(nn.Linear(5, 3), torch.ones(4))
    with pytest.raises(RecipeError, match="Conv2d"):
        fold_into_(nn.Conv2d(5, 3, 1), torch.ones(5))  # type: ignore[arg-type]
    computed = nn.Linear(5, 3)
    weft.parametrize_(computed, WeightStandardization())
    with pytest.raises(RecipeError, match="bake"):
        fold_into_(computed, torch.ones(5))
