"""variance_corrected: the variance asked for, the mean kept, and what it does to a signal."""

import numpy as np
import pytest
import torch

from weft.errors import RecipeError
from weft.merge.variance_corrected import variance_corrected

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers_in_any_selection():
    RNG.bit_generator.state = START


def reference(tensors, weights=None, target="members", mix=0.5, eps=None):
    """Independent, in float64, with numpy's variance."""
    values = [np.asarray(t, np.float64) for t in tensors]
    shares = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    shares = shares / shares.sum()
    average = sum(s * v for s, v in zip(shares, values))
    if average.size < 2:
        return average
    members = sum(s * np.var(v, ddof=1) for s, v in zip(shares, values))
    own, now = np.var(values[0], ddof=1), np.var(average, ddof=1)
    wanted = {"members": members, "self": own, "mix": mix * own + (1 - mix) * members}[target]
    guard = 0.0 if eps is None else eps
    return average.mean() + (average - average.mean()) * np.sqrt((wanted + guard) / (now + guard))


@pytest.mark.parametrize("shape", [(7, 5), (64, 33), (3, 2, 3, 3), (2, 1), (400, 400)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "self"},
        {"target": "mix", "mix": 0.3},
        {"eps": 1e-4},
        {"weights": [1, 2, 3], "eps": 0},
        {"weights": [0, 1, 1], "target": "self"},
    ],
)
def test_equals_the_formula(shape, options):
    tensors = [(RNG.standard_normal(shape) * s + 0.1).astype(np.float32) for s in (1, 2, 0.5)]
    got = variance_corrected(tensors, **options)
    expected = reference(tensors, **options)
    # a few float32 roundings of numbers of the tensors' size
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("count", [2, 5])
def test_the_variance_is_the_target_and_the_mean_stays(count):
    tensors = [(RNG.standard_normal((50, 60)) + 0.3).astype(np.float32) for _ in range(count)]
    got = variance_corrected(tensors).astype(np.float64)
    assert np.var(got, ddof=1) == pytest.approx(np.mean([np.var(t.astype(np.float64), ddof=1) for t in tensors]), 1e-6)
    assert got.mean() == pytest.approx(np.mean(tensors, dtype=np.float64), rel=1e-6)


def test_copies_are_the_identity():
    tensor = RNG.standard_normal((31, 17)).astype(np.float32)
    for count in (1, 2):  # halves add up exactly
        assert variance_corrected([tensor] * count).tobytes() == tensor.tobytes()
    for count in (3, 8):  # the sum of the copies is rounded count times, and the scale with it
        np.testing.assert_allclose(variance_corrected([tensor] * count), tensor, rtol=count * 2.0**-23, atol=1e-7)


def test_unrelated_models_lose_variance_and_get_it_back():
    models, width = 10, 200
    sigma = 1 / width
    tensors = [(RNG.standard_normal((width, width)) * sigma**0.5).astype(np.float32) for _ in range(models)]
    # the variance of a sample variance of n normal numbers is 2/n: five standard deviations
    slack = 5 * (2 / width**2) ** 0.5
    assert np.var(np.mean(tensors, axis=0)) == pytest.approx(sigma / models, rel=slack)
    assert np.var(variance_corrected(tensors)) == pytest.approx(sigma, rel=slack)


def test_the_authors_guard_damps_wide_layers():
    sigma, models = 2.4e-4, 10  # a layer 4096 wide
    tensors = [(RNG.standard_normal((300, 300)) * sigma**0.5).astype(np.float32) for _ in range(models)]
    plain = np.std(np.mean(tensors, axis=0))
    assert np.std(variance_corrected(tensors)) / plain == pytest.approx(3.16, abs=0.03)
    assert np.std(variance_corrected(tensors, eps=1e-4)) / plain == pytest.approx(1.66, abs=0.03)


def test_the_absolute_guard_is_that_of_torch_variances():
    tensors = [torch.randn(20, 30, generator=torch.Generator().manual_seed(i)) * 0.02 for i in range(4)]
    average = torch.stack(tensors).mean(0)
    wanted = torch.stack([torch.var(t) for t in tensors]).mean()
    scale = torch.sqrt((wanted + 1e-4) / (torch.var(average) + 1e-4))
    expected = (average - average.mean()) * scale + average.mean()
    torch.testing.assert_close(variance_corrected(tensors, eps=1e-4), expected, rtol=1e-5, atol=1e-8)


def test_a_signal_survives_ten_layers():
    width, depth, models = 256, 10, 4
    nets = [
        [(RNG.standard_normal((width, width)) / width**0.5).astype(np.float32) for _ in range(depth)]
        for _ in range(models)
    ]

    def power(layers):
        x = RNG.standard_normal((width, 64))
        for layer in layers:
            x = layer @ x
        return np.var(x)

    plain = [np.mean(column, axis=0) for column in zip(*nets)]
    corrected = [variance_corrected(list(column)) for column in zip(*nets)]
    # each random layer changes the power by a factor 1 ± √(2/width); ten of them by less than half
    assert power(corrected) == pytest.approx(1, rel=0.5)
    assert power(plain) == pytest.approx(models**-depth, rel=0.5)


def test_small_tensors_are_averaged_plainly():
    vectors = [RNG.standard_normal(20).astype(np.float32) for _ in range(3)]
    np.testing.assert_allclose(variance_corrected(vectors), np.mean(vectors, axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(variance_corrected(vectors, vectors=True), reference(vectors), rtol=1e-5, atol=1e-6)
    for shape in ((), (1,), (1, 1)):
        pair = [np.full(shape, 1, np.float32), np.full(shape, 2, np.float32)]
        np.testing.assert_array_equal(variance_corrected(pair, vectors=True), np.full(shape, 1.5))
    assert variance_corrected([np.zeros((0, 3), np.float32)] * 2).shape == (0, 3)


def test_no_variance_at_all():
    zero, one = np.zeros((4, 4), np.float32), np.ones((4, 4), np.float32)
    np.testing.assert_array_equal(variance_corrected([zero, zero]), 0)
    np.testing.assert_array_equal(variance_corrected([zero, one], eps=0), 0.5)
    tensor = RNG.standard_normal((4, 4)).astype(np.float32)
    np.testing.assert_array_equal(variance_corrected([tensor, -tensor]), 0)
    flat = variance_corrected([zero, tensor], target="self")
    # the guard leaves a millionth of deviations below 3
    np.testing.assert_allclose(flat, np.mean(tensor) / 2, rtol=0, atol=4e-6)


def test_a_large_mean_does_not_hide_the_variance():
    tensors = [(1000 + RNG.standard_normal((300, 300))).astype(np.float32) for _ in range(3)]
    got = variance_corrected(tensors).astype(np.float64)
    # spacing of float32 at 1000 is 6e-5
    np.testing.assert_allclose(got, reference(tensors), rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype):
    tensors = [torch.randn(40, 9, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    exact = variance_corrected([t.float().numpy() for t in tensors])
    assert torch.equal(variance_corrected(tensors), torch.from_numpy(exact).to(dtype))


def test_a_state_dict_is_corrected_tensor_by_tensor():
    states = [
        {"a": RNG.standard_normal((5, 5)).astype(np.float32), "b": 9 * np.ones((2, 2), np.float32)} for _ in range(2)
    ]
    merged = variance_corrected(states)
    np.testing.assert_array_equal(merged["a"], variance_corrected([s["a"] for s in states]))
    np.testing.assert_array_equal(merged["b"], 9)


def test_wrong_requests():
    tensor = np.ones((2, 2), np.float32)
    with pytest.raises(RecipeError, match="sum to zero"):
        variance_corrected([tensor, tensor], weights=0)
    with pytest.raises(RecipeError, match="between 0"):
        variance_corrected([tensor, tensor], weights=[2, -1])
    with pytest.raises(RecipeError, match="must be one of"):
        variance_corrected([tensor], target="others")
