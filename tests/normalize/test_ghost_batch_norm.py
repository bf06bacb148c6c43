import pytest
import torch
from torch import nn

from weft.errors import RecipeError, ShapeError
from weft.normalize import GhostBatchNorm1d, GhostBatchNorm2d, adapt_regime, scale_learning_rate

CASES = [
    (GhostBatchNorm1d, nn.BatchNorm1d, (12, 3)),
    (GhostBatchNorm1d, nn.BatchNorm1d, (12, 3, 5)),
    (GhostBatchNorm2d, nn.BatchNorm2d, (12, 3, 2, 4)),
]


@pytest.mark.parametrize(("ours", "torchs", "shape"), CASES)
@pytest.mark.parametrize("momentum", [0.1, 0.5])
@pytest.mark.parametrize("ghost_size", [3, 4, 5, 6, 7, 12, 100])
def test_it_is_batch_norm_called_on_one_part_after_another(
    ours: type, torchs: type, shape: tuple[int, ...], momentum: float, ghost_size: int
) -> None:
    torch.manual_seed(0)
    layer = ours(3, ghost_size=ghost_size, momentum=momentum).double()
    peer = torchs(3, momentum=momentum).double()
    with torch.no_grad():
        peer.weight.copy_(layer.weight.normal_())
        peer.bias.copy_(layer.bias.normal_())
    count = max(1, 12 // ghost_size)
    sizes = [ghost_size] * (count - 1) + [12 - ghost_size * (count - 1)]
    for _ in range(3):
        x = 3 * torch.randn(shape, dtype=torch.float64) + 1
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        made, expected = layer(first), torch.cat([peer(p) for p in second.split(sizes)])
        torch.testing.assert_close(made, expected)
        upstream = torch.randn_like(x)
        made.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(layer.running_mean, peer.running_mean)
    torch.testing.assert_close(layer.running_var, peer.running_var)
    torch.testing.assert_close(layer.weight.grad, peer.weight.grad)
    torch.testing.assert_close(layer.eval()(x), peer.eval()(x))


def test_one_value_a_channel_has_no_variance() -> None:
    with pytest.raises(ShapeError, match="one value a channel"):
        GhostBatchNorm1d(3, ghost_size=1)(torch.randn(4, 3))
    GhostBatchNorm1d(3, ghost_size=1)(torch.randn(4, 3, 2))
    assert GhostBatchNorm1d(3).eval()(torch.randn(1, 3)).shape == (1, 3)


def test_the_sqrt_rule_keeps_the_variance_of_a_step() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(200_000, dtype=torch.float64)  # of single samples
    small = 0.1 * gradients.view(-1, 16).mean(1)
    large = scale_learning_rate(0.1, 64, 16) * gradients.view(-1, 64).mean(1)
    # 3125 and 12500 steps: the ratio of the variances has a deviation of sqrt(2/3125 + 2/12500) = 2.8%
    assert float(large.var() / small.var()) == pytest.approx(1, abs=0.085)
    assert scale_learning_rate(0.1, 64, 16, rule="linear") == pytest.approx(0.4)


def test_the_regime_keeps_the_number_of_steps() -> None:
    boundaries, epochs = adapt_regime([80, 120], 160, batch=4096, reference=128)
    assert (boundaries, epochs) == ((2560, 3840), 5120)
    samples = 50 * 4096
    assert epochs * (samples // 4096) == 160 * (samples // 128)
    assert adapt_regime([10], 11, batch=3, reference=2) == ((15,), 17)
    assert adapt_regime((), 5, batch=4, reference=4) == ((), 5)


def test_bad_requests() -> None:
    with pytest.raises(RecipeError, match="rule"):
        scale_learning_rate(0.1, 64, 16, rule="cube")
    with pytest.raises(RecipeError, match="positive"):
        adapt_regime([1], 2, batch=0, reference=1)
