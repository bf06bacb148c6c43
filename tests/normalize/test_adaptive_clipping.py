import numpy as np
import pytest
import torch
from torch import nn

import weft
from weft.errors import RecipeError
from weft.normalize import WeightStandardization, clip_grad_adaptive_


def model_with_gradients(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * torch.rand(len(parameter)).view(-1, *[1] * (parameter.dim() - 1))
    return model


def units(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.detach().double().numpy()
    return array.reshape(len(array), -1) if array.ndim > 1 else array.reshape(1, -1)


@pytest.mark.parametrize("clip", [0.01, 1.28, 3.0])
def test_against_the_formula_unit_by_unit(clip: float) -> None:
    model = model_with_gradients()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    share = clip_grad_adaptive_(model, clip)
    clipped = total = 0
    for name, parameter in model.named_parameters():
        for weight, gradient, made in zip(units(parameter), units(before[name]), units(parameter.grad)):
            limit, norm = clip * max(np.linalg.norm(weight), 1e-3), np.linalg.norm(gradient)
            total += 1
            clipped += norm > limit
            if norm > limit:
                np.testing.assert_allclose(made, gradient * limit / norm, rtol=1e-6)
            else:
                np.testing.assert_array_equal(made, gradient)
    assert clipped == total if clip < 1 else 0 < clipped < total
    assert float(share) == pytest.approx(clipped / total)


def test_no_unit_is_above_its_limit_afterwards() -> None:
    model = model_with_gradients(1)
    clip_grad_adaptive_(model, 0.05)
    for parameter in model.parameters():
        ratio = np.linalg.norm(units(parameter.grad), axis=1) / np.linalg.norm(units(parameter), axis=1)
        assert (ratio <= 0.05 * (1 + 1e-6)).all()


def test_excluded_layers_are_left_alone_with_their_weight_functions() -> None:
    model = model_with_gradients()
    weft.parametrize_(model, WeightStandardization(), where="3")
    model[3].parametrizations["weight"].original.grad = torch.ones(3, 5)
    before = [p.grad.clone() for p in model[3].parameters()]
    clip_grad_adaptive_(model, 1e-6, exclude="3")
    assert all(torch.equal(p.grad, b) for p, b in zip(model[3].parameters(), before))
    assert float(model[2].weight.grad.norm()) < 1e-4


def test_zeros_and_missing_gradients() -> None:
    zero, nothing, scalar = (
        nn.Parameter(torch.zeros(3, 4)),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.tensor(2.0)),
    )
    zero.grad, scalar.grad = torch.ones(3, 4), torch.tensor(0.0)
    assert float(clip_grad_adaptive_([zero, nothing, scalar], 0.5)) == pytest.approx(3 / 4)
    torch.testing.assert_close(zero.grad.norm(dim=1), torch.full((3,), 0.5e-3))
    assert scalar.grad == 0
    assert nothing.grad is None
    assert float(clip_grad_adaptive_([])) == 0


def test_half_precision_keeps_its_dtype() -> None:
    weight = nn.Parameter(torch.ones(2, 300, dtype=torch.bfloat16))
    weight.grad = torch.full((2, 300), 5.0, dtype=torch.bfloat16)
    clip_grad_adaptive_(weight, 0.1)
    assert weight.grad.dtype == torch.bfloat16
    # the ratio and the product are rounded once each
    torch.testing.assert_close(weight.grad.float(), torch.full((2, 300), 0.1), rtol=2 * 2**-8, atol=0)


def test_bad_requests() -> None:
    with pytest.raises(RecipeError, match="clip must be positive"):
        clip_grad_adaptive_([], 0.0)
    with pytest.raises(RecipeError, match="needs a model"):
        clip_grad_adaptive_([torch.ones(2)], exclude="head")
