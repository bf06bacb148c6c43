"""pcb against a dense float64 reference written from the equations, and its limits."""

import numpy as np
import pytest
import torch

import weft
from weft.merge.pcb import VARIANTS, pcb

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers_in_any_selection():
    RNG.bit_generator.state = START


def reference(deltas, weights=1.0, density=0.05, clip=0.01, lambda_=1.2, variant="pairwise"):
    """(models, d) -> merged, its error bound for float32, S."""
    tau = np.asarray(deltas, np.float64)
    n, d = tau.shape
    ordered, cut = np.sort(np.abs(tau)), int(clip * d)
    clipped = np.clip(np.abs(tau), ordered[:, cut, None], ordered[:, d - 1 - cut, None])
    norm = (clipped - clipped.min(1, keepdims=True)) / np.ptp(clipped, axis=1)[:, None]
    t = np.sign(tau) * norm
    if variant == "pairwise":
        pairs = np.tanh(t[:, None] * t[None])
        agreement, size = pairs.sum(1), np.abs(pairs).sum(1)
    else:
        source = t if variant == "sum" else tau
        agreement = np.tanh(tau * source.sum(0))
        size = np.abs(agreement) + (1 - agreement**2) * np.abs(tau) * np.abs(source).sum(0)
    intra = np.exp(n * (norm**2 - 1))
    beta = intra * agreement
    threshold = np.sort(beta)[:, d - 1 - min(int(density * d), d - 1), None]
    span = beta.max(1, keepdims=True) - threshold
    s = (np.maximum(beta, threshold) - threshold) / span
    mass = np.maximum(s.sum(0), 1e-12)
    scale = lambda_ * np.broadcast_to(np.asarray(weights, np.float64).reshape(-1, 1), (n, 1))
    parts = scale * np.sign(tau) * clipped
    merged = (s * parts).sum(0) / mass
    # float32: n + 4 roundings of terms of this size, and n of the exponent; a rank moves by what stands near it
    rough = (2 * n + 4) * 2.0**-23 * intra * size
    of_rank = np.where(np.abs(beta - threshold) <= 2 * rough, rough, 0).max(1, keepdims=True)
    of_top = np.take_along_axis(rough, beta.argmax(1)[:, None], 1)
    slack = (rough + of_rank + s * (of_rank + of_top)) / span
    slack[beta < threshold - rough - of_rank] = 0
    bound = (slack * (np.abs(parts) + np.abs(merged))).sum(0) / mass + 1e-6 * np.abs(merged)
    return merged, bound, s


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("models", "density", "clip"), [(1, 0.05, 0.01), (3, 0.05, 0.01), (8, 0.2, 0.0), (4, 0.9, 0.1)]
)
def test_equals_the_dense_reference(variant, models, density, clip):
    shapes = {"a": (37, 11), "b": (13,), "c": (), "d": (1,), "e": (0, 3), "f": (5, 2, 3, 3)}
    deltas = [{n: np.asarray(RNG.standard_normal(s), np.float32) for n, s in shapes.items()} for _ in range(models)]
    flat = np.stack([np.concatenate([m[n].reshape(-1) for n in shapes]) for m in deltas])
    weights = RNG.uniform(0.5, 1.5, models)
    merged = pcb(deltas, weights=weights.tolist(), density=density, clip=clip, lambda_=0.7, variant=variant)
    got = np.concatenate([merged[n].reshape(-1) for n in shapes])
    expected, bound, s = reference(flat, weights, density, clip, 0.7, variant)
    clear = bound < 0.01
    assert clear[expected != 0].mean() > 0.9, "the comparison would say nothing"
    np.testing.assert_array_less(np.abs(got - expected)[clear], bound[clear] + 1e-30)
    assert (got != 0).sum() == (s.max(0) > 0).sum()


def test_the_share_that_is_kept():
    delta = RNG.standard_normal(1000).astype(np.float32)
    for density in (0, 0.05, 0.3, 0.999):
        assert np.count_nonzero(pcb([delta], density=density, clip=0)) == int(density * 1000)
    assert np.count_nonzero(pcb([delta], density=1, clip=0)) == 999  # the smallest is where S begins
    assert np.count_nonzero(pcb([delta], density=1, clip=0.01)) == 1000 - 11  # eleven are equally small


def test_one_model_is_its_clipped_change_where_it_is_kept():
    delta = RNG.standard_normal(1000).astype(np.float32)
    merged = pcb([delta], density=0.1, clip=0.02, lambda_=2)
    kept = merged != 0
    high = np.sort(np.abs(delta))[1000 - 1 - 20]
    # S cancels but for two roundings
    np.testing.assert_allclose(merged[kept], 2 * np.clip(delta, -high, high)[kept], rtol=3e-7)
    assert set(np.flatnonzero(kept)) == set(np.argsort(-np.abs(delta))[:100])


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_of_one_model(variant):
    delta = RNG.standard_normal((20, 30)).astype(np.float32)
    alone = pcb([delta], density=0.2, variant=variant)
    together = pcb([delta] * 4, density=0.2, variant=variant)
    high = np.sort(np.abs(delta), axis=None)[600 - 1 - 6]
    kept = together != 0
    np.testing.assert_array_equal(kept, alone != 0)
    np.testing.assert_allclose(together[kept], 1.2 * np.clip(delta, -high, high)[kept], rtol=1e-6)


def test_a_power_of_two_on_one_model_changes_nothing_but_its_scale():
    deltas = RNG.standard_normal((3, 400)).astype(np.float32)
    scaled = pcb([8 * deltas[0], deltas[1], deltas[2]], weights=[0.125, 1, 1])
    np.testing.assert_array_equal(scaled, pcb(list(deltas)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_models(variant):
    a, b, c = RNG.standard_normal((3, 500)).astype(np.float32)
    np.testing.assert_array_equal(pcb([a, b], variant=variant), pcb([b, a], variant=variant))
    forward = pcb([a, b, c], weights=[1, 2, 3], variant=variant)
    _, bound, _ = reference([a, b, c], [1, 2, 3], variant=variant)
    np.testing.assert_array_less(
        np.abs(forward - pcb([c, a, b], weights=[3, 1, 2], variant=variant)), 2 * bound + 1e-30
    )


def test_a_state_dict_is_one_vector():
    flat = RNG.standard_normal((3, 600)).astype(np.float32)
    whole = pcb(list(flat))
    parts = pcb([{"a": f[:100].reshape(10, 10), "b": f[100:101].reshape(()), "c": f[101:]} for f in flat])
    np.testing.assert_array_equal(np.concatenate([parts[n].reshape(-1) for n in "abc"]), whole)
    each = pcb([f[:100] for f in flat])
    assert (each != whole[:100]).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_degenerate_changes(variant):
    zero, one = np.zeros(50, np.float32), RNG.standard_normal(50).astype(np.float32)
    np.testing.assert_array_equal(pcb([zero, zero], variant=variant), 0)
    assert np.isfinite(pcb([zero, one], density=0.5, variant=variant)).all()
    equal = np.sign(one)
    np.testing.assert_allclose(pcb([equal, equal], lambda_=1, variant=variant), equal, rtol=1e-6)
    np.testing.assert_array_equal(pcb([one, one], density=0, variant=variant), 0)
    for size in ((), (1,), (0,), (0, 3)):
        value = np.full(size, 2, np.float32)
        assert pcb([value, value], variant=variant).shape == size
    two = np.full((), 2, np.float32)
    assert pcb([two, two], density=1, lambda_=1, variant=variant) == 2
    tiny = (one * 1e-40).astype(np.float32)
    assert np.isfinite(pcb([tiny, tiny], density=0.5, variant=variant)).all()
    huge = (one * 1e37).astype(np.float32)
    assert np.isfinite(pcb([huge, huge], density=0.5, variant="pairwise")).all()


def test_opposite_changes_cancel():
    delta = RNG.standard_normal(100).astype(np.float32)
    np.testing.assert_array_equal(pcb([delta, -delta]), 0)


def test_a_hundred_models_do_not_overflow():
    deltas = RNG.standard_normal((100, 300)).astype(np.float32)
    merged = pcb(list(deltas), density=0.1)
    assert np.isfinite(merged).all()
    assert merged.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype):
    deltas = [torch.randn(40, 9, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    merged = pcb(deltas, density=0.3)
    assert merged.dtype == dtype
    exact = pcb([d.float().numpy() for d in deltas], density=0.3)
    assert torch.equal(merged, torch.from_numpy(exact).to(dtype))


def test_on_files_a_nan_that_is_let_through_stays_where_it_is(tmp_path):
    base = {"w": RNG.standard_normal((30, 20)).astype(np.float32)}
    models = [{"w": base["w"] + 0.1 * RNG.standard_normal((30, 20)).astype(np.float32)} for _ in range(2)]
    step = {"method": "pcb", "models": ["a", "b"], "base": "base", "parameters": {"density": 0.5, "clip": 0}}
    given = {"a": models[0], "b": models[1], "base": base}
    weft.run({"steps": [step]}, tmp_path / "clean", models=given)
    with weft.open(tmp_path / "clean") as written:
        clean = written["w"].numpy()
    expected = base["w"] + pcb([m["w"] - base["w"] for m in models], density=0.5, clip=0)
    np.testing.assert_array_equal(clean, expected)
    models[0]["w"][3, 4] = np.nan
    weft.run({"steps": [step], "allow_non_finite": True}, tmp_path / "out", models=given)
    with weft.open(tmp_path / "out") as written:
        assert np.flatnonzero(np.isnan(written["w"].numpy())).tolist() == [3 * 20 + 4]
