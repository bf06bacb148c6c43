import numpy as np
import pytest
import torch
from torch import nn

from weft.normalize import UnifiedNorm
from weft.normalize.unified_norm import geometric_mean


def random_layer(**options: object) -> UnifiedNorm:
    torch.manual_seed(0)
    layer = UnifiedNorm(3, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    return layer


def test_kober_bounds_the_gap_of_the_means() -> None:
    torch.manual_seed(0)
    for size in (2, 3, 4, 9):
        window = torch.rand(size, 2000, dtype=torch.float64).pow(3)
        gap = window.mean(0) - geometric_mean(window)
        bound = size * window.sqrt().var(0, correction=0)
        assert bool((gap >= -1e-15).all())
        assert bool((gap <= bound + 1e-12).all())
        if size == 2:
            torch.testing.assert_close(gap, bound)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("warmup", [0, 6])
def test_forward_and_backward_against_the_algorithm_in_numpy(
    monkeypatch: pytest.MonkeyPatch, pooled: bool, warmup: int
) -> None:
    monkeypatch.setattr("weft.normalize.unified_norm._RATIO_STEPS", 8)
    random, size, a, eps = np.random.default_rng(1), 4, 0.9, 1e-5
    layer = random_layer(window=size, warmup=warmup, pooled=pooled)
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    running, smooth = np.ones(3), np.zeros(3)
    squares: list[np.ndarray] = [np.ones(3)] * size
    projections: list[np.ndarray] = [np.zeros(3)] * size
    skips = np.zeros(3)
    for step in range(30):
        loud = 30 if step in (12, 20) else 1
        x, upstream = random.normal(0.2, loud, (11, 3)), random.standard_normal((11, 3))
        q, slot = (x**2).mean(0), step % size
        roots = np.sqrt(np.stack(squares))
        new = [q if i == slot else s for i, s in enumerate(squares)]
        geometric = np.exp(np.mean(np.log(new), 0))
        early = step < size or step + 1 < warmup
        gap = np.mean(new, 0) - geometric
        skip = gap > size * (roots.var(ddof=1) if pooled else roots.var(0))
        skip = np.full(3, skip.any()) if pooled else skip
        skip = skip & (not early)
        skips += skip
        v = np.where(early | skip, q, geometric)
        ratio = np.clip(np.sqrt((v + eps) / (running + eps)), 0.2, 5)
        ratio = np.where((step < max(8, warmup)) | skip, 1, ratio)
        new[slot] = np.where(skip, running, q)
        squares = new
        running = a * running + (1 - a) * np.where(early, q, geometric)
        z = x / np.sqrt(v + eps)
        g = gamma * ratio * upstream
        p = (g * z).mean(0)
        held = [np.where(skip, smooth, p) if i == slot else s for i, s in enumerate(projections)]
        projections = held
        smooth = a * smooth + (1 - a) * np.where(early | skip, p, np.mean(held, 0))
        expected = (g - np.where(early | skip, p, smooth) * z) / np.sqrt(v + eps)
        given = torch.from_numpy(x).requires_grad_()
        layer.zero_grad()
        made = layer(given)
        made.backward(torch.from_numpy(upstream))
        np.testing.assert_allclose(made.detach(), gamma * z + beta, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(given.grad, expected, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(layer.weight.grad, (upstream * ratio * z).sum(0), rtol=1e-8)
        np.testing.assert_allclose(layer.running_square, running, rtol=1e-9)
        np.testing.assert_allclose(layer.running_projection, smooth, rtol=1e-8, atol=1e-14)
    assert skips.min() >= 2  # both loud batches were outliers in every channel
    np.testing.assert_array_equal(layer.skipped, skips)


def test_a_window_of_one_is_batch_normalisation_by_the_root_mean_square() -> None:
    layer = random_layer(window=1, warmup=0)
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().mean(0) + layer.eps).sqrt() * layer.weight + layer.bias
    made = layer(x)
    torch.testing.assert_close(made, expected)
    target = torch.randn_like(x)
    ours, exact = (torch.autograd.grad((y * target).sum(), x)[0] for y in (made, expected))
    torch.testing.assert_close(ours, exact)


def test_an_outlier_moves_the_filtered_statistics_less() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(500, 3, dtype=torch.float64) for _ in range(16)]
    batches[10] = 100 * batches[10]
    moved = {}
    for filtered in (True, False):
        layer = random_layer(warmup=0, outlier_filter=filtered)
        for batch in batches:
            layer(batch)
        assert bool((layer.skipped > 0).all()) == filtered
        moved[filtered] = layer.running_square.sub(1).abs()
    assert bool((moved[True] < 0.5 * moved[False]).all())


def test_after_a_lasting_change_the_filter_gives_way() -> None:
    torch.manual_seed(0)
    layer = random_layer(warmup=0)
    for scale, steps in ((1.0, 20), (10.0, 200)):
        for _ in range(steps):
            layer(scale * torch.randn(500, 3, dtype=torch.float64))
    torch.testing.assert_close(layer.running_square, torch.full((3,), 100.0, dtype=torch.float64), rtol=0.1, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_fused_into_the_next_layer_evaluation_is_the_same(bias: bool) -> None:
    layer, linear = random_layer(), nn.Linear(3, 4, bias=bias).double()
    for _ in range(3):
        layer(torch.randn(9, 3, dtype=torch.float64))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = linear(layer.eval()(x))
    left = layer.fuse_(linear)
    torch.testing.assert_close(linear(left(x)), expected)


def test_padding_has_no_influence() -> None:
    torch.manual_seed(0)
    valid = torch.tensor([[True, True, False], [True, False, True]])
    first, packed = random_layer(warmup=0), random_layer(warmup=0)
    for _ in range(9):
        x = torch.randn(2, 3, 3, dtype=torch.float64)
        y, z = first(torch.where(valid.unsqueeze(-1), x, 50.0), valid), packed(x[valid])
        torch.testing.assert_close(y[valid], z)
        y[valid].square().sum().backward()
        z.square().sum().backward()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, packed.state_dict()[name])
