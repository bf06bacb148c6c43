import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from weft.errors import ShapeError
from weft.normalize import BatchChannelNorm2d, EstimatedBatchNorm2d


def filled(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer.double()


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_it_is_batch_norm_then_group_norm_with_one_gain_a_group(groups: int) -> None:
    torch.manual_seed(groups)
    layer, peer = filled(BatchChannelNorm2d(6, groups=groups)), nn.BatchNorm2d(6).double()
    peer.load_state_dict(layer.batch_norm.state_dict())
    for training in (True, True, False):
        x = torch.randn(4, 6, 3, 5, dtype=torch.float64)
        y = peer.train(training)(x).reshape(4, groups, -1)
        mean, variance = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, correction=0)
        z = layer.weight.view(1, -1, 1) * (y - mean) / (variance + 1e-5).sqrt() + layer.bias.view(1, -1, 1)
        torch.testing.assert_close(layer.train(training)(x), z.reshape(x.shape))
    torch.testing.assert_close(layer.batch_norm.running_var, peer.running_var)


def test_with_as_many_groups_as_channels_it_ends_in_torchs_group_norm() -> None:
    layer, x = filled(BatchChannelNorm2d(4, groups=4)).eval(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = functional.group_norm(layer.batch_norm(x), 4, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_groups_must_divide_the_channels() -> None:
    with pytest.raises(ShapeError, match="4 groups do not divide 6"):
        BatchChannelNorm2d(6, groups=4)


def test_estimates_against_a_loop() -> None:
    random, rate = np.random.default_rng(0), 0.25
    layer = EstimatedBatchNorm2d(3, rate=rate).double()
    mean, variance = np.zeros(3), np.ones(3)
    for _ in range(6):
        x = random.normal(2, 3, (1, 3, 4, 5))
        batch, square = np.zeros(3), np.zeros(3)
        for c in range(3):
            values = [v for row in x[0, c] for v in row]
            batch[c] = sum(values) / 20
            square[c] = sum((v - mean[c]) ** 2 for v in values) / 20
        mean, variance = (1 - rate) * mean + rate * batch, (1 - rate) * variance + rate * square
        expected = (x - mean[None, :, None, None]) / np.sqrt(variance + 1e-5)[None, :, None, None]
        np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), expected, rtol=1e-12)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, variance, rtol=1e-12)


def test_training_and_evaluation_agree_right_after_a_step() -> None:
    layer, x = EstimatedBatchNorm2d(3), torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_no_gradient_flows_through_the_estimates() -> None:
    layer = filled(EstimatedBatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    torch.testing.assert_close(x.grad, scale.detach().view(1, 3, 1, 1).expand_as(x))


def test_the_rate_can_be_scheduled() -> None:
    layer, x = EstimatedBatchNorm2d(2), torch.randn(2, 2, 3, 3)
    layer.rate.fill_(0.0)
    layer(x)
    assert layer.running_mean.tolist() == [0, 0]
    layer.rate.fill_(1.0)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


def test_estimates_reach_the_moments_of_the_data() -> None:
    torch.manual_seed(0)
    layer = BatchChannelNorm2d(2, estimate=True, rate=0.02)
    for _ in range(400):
        layer(2 * torch.randn(1, 2, 8, 8) + 3)
    # a batch's mean has deviation 2/8, averaged over about 1/0.02 batches: 0.04 is one deviation of the estimate
    torch.testing.assert_close(layer.batch_norm.running_mean, torch.full((2,), 3.0), atol=0.15, rtol=0)
    torch.testing.assert_close(layer.batch_norm.running_var, torch.full((2,), 4.0), atol=0.6, rtol=0)
