"""Tiny floating-point weights, constrained scales, compensation and low-rank patches."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from real_layer import held_out_error, real_layer

from weft.calibrate import Statistics
from weft.calibrate.facts import Facts
from weft.errors import RecipeError
from weft.packed import Activations, LowRank, Minifloat
from weft.packed.levels import minifloat_levels
from weft.quantize import FloatingPoint, ZeroQuantFP, float_codes, float_scales, low_rank_patch, zeroquant_codes
from weft.quantize.floating_point import nearest_codes

TOP = {"e2m1": 6.0, "e3m0": 16.0, "e4m3": 448.0}


def weights(rows: int = 12, columns: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform = 2 * torch.rand(rows, columns, generator=generator) - 1
    return -uniform.sign() * (1 - uniform.abs()).log()  # Laplace


def gram(columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return (x.T @ x).double()


def statistics(matrix: Tensor) -> Statistics:
    return Statistics({"layer/gram": matrix}, Facts(layers={"layer": ("layer", 1000)}))


def test_values() -> None:
    assert minifloat_levels("e2m1").tolist()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert minifloat_levels("e3m0").tolist()[:8] == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    patterns = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(minifloat_levels("e4m3").nan_to_num(), patterns.nan_to_num())


def test_eight_bits_are_those_of_torch() -> None:
    torch.manual_seed(0)
    steps = torch.cat([(torch.randn(5000) * 100).clamp(-448, 448), minifloat_levels("e4m3").nan_to_num(),
                       torch.tensor([0.0, 1e-9, 2**-10, 3 * 2**-10, 17.0, 19.0, 449.0, -1e9])])  # fmt: skip
    found = minifloat_levels("e4m3")[nearest_codes(steps, "e4m3").long()]
    assert torch.equal(found, steps.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("kind", ["e2m1", "e3m0"])
def test_the_nearest_value_and_halves_to_even_patterns(kind: str) -> None:
    levels = minifloat_levels(kind)
    steps = torch.linspace(-TOP[kind] * 1.2, TOP[kind] * 1.2, 4001)
    found = levels[nearest_codes(steps, kind).long()]
    assert torch.allclose((found - steps).abs(), (levels.unsqueeze(1) - steps).abs().amin(0))
    positive = levels[:8]
    middles = (positive[:-1] + positive[1:]) / 2
    assert (nearest_codes(middles, kind) % 2 == 0).all()
    assert torch.equal(nearest_codes(-middles, kind) % 8, nearest_codes(middles, kind))


@pytest.mark.parametrize("kind", list(TOP))
def test_constrained_scales(kind: str) -> None:
    w = weights() * torch.logspace(-3, 3, 12).unsqueeze(1)
    free, m1, m2, ceiled = (
        float_scales(w, FloatingPoint(kind, 16, c)).double() for c in ("free", "m1", "m2", "m2-ceil")
    )
    assert torch.allclose(free, w.double().unflatten(1, (-1, 16)).abs().amax(-1) / TOP[kind])
    assert torch.equal(m1.log2(), m1.log2().round())
    assert ((m1 >= free) & (m1 < 2 * free)).all()
    for found in (m2, ceiled):
        ratio = found.amax(1, keepdim=True) / found
        assert torch.equal(ratio.log2(), ratio.log2().round())
    assert torch.equal(m2.amax(1), free.amax(1))
    assert ((m2 >= free * (1 - 1e-6)) & (m2 < 2 * free)).all()  # nothing is clipped
    assert ((ceiled <= free * (1 + 1e-6)) & (ceiled > free / 2)).all()
    # exact powers stay
    exact = torch.tensor([[6.0, 0.1, 3.0, 0.1, 0.75, 0.0]])
    for constraint in ("m1", "m2", "m2-ceil"):
        assert float_scales(exact, FloatingPoint("e2m1", 2, constraint)).tolist() == [[1.0, 0.5, 0.125]]


def test_four_bits_on_powers_of_two_are_eight_bits() -> None:
    """FP4 · 2^k is an FP8 number as long as the exponent fits."""
    made = float_codes(weights(), float_scales(weights(), FloatingPoint("e2m1", 16, "m1")), "e2m1").dequantize()
    assert torch.equal(made, made.to(torch.float8_e4m3fn).float())
    m2 = float_codes(weights(), scale := float_scales(weights(), FloatingPoint("e2m1", 16, "m2")), "e2m1").dequantize()
    shifted = m2 / scale.amax(1, keepdim=True)  # what is left after the row's own scale
    assert torch.equal(shifted, shifted.to(torch.float8_e4m3fn).float())


def test_errors_of_constraints_on_laplace_weights() -> None:
    """Free < m2 < m1 < m2 as printed; the figures are those of 256 weights a group."""
    w = weights(256, 2048)
    error = {}
    for constraint in ("free", "m2", "m1", "m2-ceil"):
        made = float_codes(w, float_scales(w, FloatingPoint("e2m1", 64, constraint)), "e2m1").dequantize()
        error[constraint] = float((made - w).norm() / w.norm())
    assert error["free"] < error["m2"] < error["m1"] < error["m2-ceil"], error
    assert error["m2-ceil"] > 1.4 * error["free"]


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_the_plain_patch_is_that_of_eckart_and_young(shape: tuple[int, int]) -> None:
    lost = 0.01 * weights(*shape)
    values = torch.linalg.svdvals(lost.double())
    for rank in (1, 5, 12):
        left, right = low_rank_patch(lost, rank)
        assert left.shape == (shape[0], rank)
        assert right.shape == (rank, shape[1])
        tail = float((lost.double() - left.double() @ right.double()).square().sum())
        assert tail == pytest.approx(float(values[rank:].square().sum()), rel=1e-4, abs=1e-10)
        assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_the_weighted_patch_is_the_best_for_outputs(shape: tuple[int, int]) -> None:
    lost, g = 0.01 * weights(*shape), gram(shape[1])
    root = torch.linalg.cholesky(g)
    values = torch.linalg.svdvals(lost.double() @ root)

    def energy(rest: Tensor) -> float:
        return float((rest.double() @ root).square().sum())

    for rank in (1, 5):
        plain, best = (lost - a @ b for a, b in (low_rank_patch(lost, rank), low_rank_patch(lost, rank, g)))
        assert energy(best) == pytest.approx(float(values[rank:].square().sum()), rel=1e-3)
        assert energy(best) < energy(plain)
    # a Gram matrix of fewer rows than inputs: what no input reaches costs nothing
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(2)).double()
    left, right = low_rank_patch(lost, 3, x.T @ x)
    assert float((x @ (lost - left @ right).double().T).abs().max()) < 1e-5
    # zeros of rows stay zeros, and a rank beyond that of what was lost adds nothing
    sparse = torch.zeros(shape)
    sparse[2] = 1.0
    left, right = low_rank_patch(sparse, 4, g)
    assert torch.equal((left @ right).abs().sum(1) > 0, torch.arange(shape[0]) == 2)
    assert torch.allclose(left @ right, sparse, atol=1e-5)
    assert (low_rank_patch(torch.zeros(shape), 2)[0] == 0).all()
    for bad in (0, 13):
        with pytest.raises(RecipeError, match="rank"):
            low_rank_patch(lost, bad)
    with pytest.raises(RecipeError, match="NaN"):
        low_rank_patch(lost, 2, torch.full((shape[1], shape[1]), float("nan")))


def column_by_column(w: Tensor, g: Tensor, scale: Tensor, kind: str, damping: float) -> Tensor:
    """The free columns move to the minimum given all rounded ones; float64."""
    h = g + damping * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    w, original = w.double().clone(), w.double()
    spread = scale.double().repeat_interleave(w.shape[1] // scale.shape[1], 1)
    order = g.diagonal().argsort(descending=True, stable=True).tolist()
    for position, j in enumerate(order):
        w[:, j] = (
            minifloat_levels(kind)[nearest_codes((w[:, j] / spread[:, j]).float(), kind).long()].double() * spread[:, j]
        )
        done, free = order[: position + 1], order[position + 1 :]
        if free:
            delta = original[:, done] - w[:, done]
            w[:, free] = original[:, free] + delta @ h[done][:, free] @ torch.linalg.inv(h[free][:, free])
    return w


@pytest.mark.parametrize("kind", ["e2m1", "e3m0"])
def test_compensation_by_brute_force(kind: str) -> None:
    w, g = weights(5, 24), gram(24)
    config = ZeroQuantFP(kind, 8, "m2", rank=0, activations="none")
    made = zeroquant_codes(w, g, config)
    expected = column_by_column(w, g, float_scales(w, config), kind, 0.01)
    assert (made.dequantize().double() - expected).abs().gt(1e-4).float().mean() < 0.02
    plain = zeroquant_codes(w, g, ZeroQuantFP(kind, 8, "m2", rank=0, activations="none", compensate=False))

    def energy(new: Tensor) -> float:
        delta = (new - w).double()
        return float(((delta @ g) * delta).sum())

    assert energy(made.dequantize()) < 0.8 * energy(plain.dequantize())
    patched = zeroquant_codes(w, g, ZeroQuantFP(kind, 8, "m2", rank=2, activations="none"))
    assert energy(patched.dequantize()) < energy(made.dequantize())


def test_forms() -> None:
    w, g = weights(6, 32), gram(32)
    made = zeroquant_codes(w, g, ZeroQuantFP(group_size=16, rank=2))
    assert isinstance(made, Activations)
    assert made.kind == "e4m3"
    assert isinstance(made.inner, LowRank)
    assert isinstance(made.inner.inner, Minifloat)
    assert made.inner.inner.block == (1, 16)
    without = ZeroQuantFP(group_size=16, constraint="m1").without_data().fit("layer", w, statistics(g))
    assert isinstance(without, Activations)
    assert isinstance(without.inner, Minifloat)
    # an input that nothing reached, and nothing at all
    g[3] = g[:, 3] = 0
    assert zeroquant_codes(w, g, ZeroQuantFP(group_size=16)).dequantize().isfinite().all()
    nothing = zeroquant_codes(w, torch.zeros(32, 32), ZeroQuantFP(group_size=16, rank=0)).dequantize()
    assert torch.equal(nothing, float_codes(w, float_scales(w, ZeroQuantFP(group_size=16)), "e2m1").dequantize())
    halves = zeroquant_codes(w, torch.stack([gram(32), gram(32, 5)]), ZeroQuantFP(group_size=16, activations="none"))
    assert isinstance(halves, Minifloat)
    both = [zeroquant_codes(p, m, ZeroQuantFP(group_size=16, rank=0, activations="none")) for p, m in
            zip(w.chunk(2), (gram(32), gram(32, 5)))]  # fmt: skip
    assert torch.equal(halves.dequantize(), torch.cat([b.dequantize() for b in both]))


def test_a_real_layer() -> None:
    weight, g, held = real_layer()

    def error(**options: object) -> float:
        return held_out_error(ZeroQuantFP(group_size=64, activations="none", **options), weight, g, held)  # type: ignore[arg-type]

    plain = error(compensate=False, rank=0)
    assert error(rank=0) < plain
    assert error(compensate=False, patch="gram") < error(compensate=False, patch="plain") < plain
    assert error(rank=0, constraint="m2") < error(rank=0, constraint="m2-ceil")


def test_bad_input_is_refused() -> None:
    for bad in ({"kind": "e1m2"}, {"constraint": "m3"}, {"activations": "int8"}, {"group_size": -1}):
        with pytest.raises(RecipeError):
            FloatingPoint(**bad)  # type: ignore[arg-type]
    for bad in ({"rank": -1}, {"patch": "x"}, {"damping": float("nan")}):
        with pytest.raises(RecipeError):
            ZeroQuantFP(**bad)  # type: ignore[arg-type]
    for matrix in (torch.eye(63), torch.ones(64), torch.zeros(5, 64, 64)):
        with pytest.raises(RecipeError, match="Gram"):
            zeroquant_codes(weights(), matrix, ZeroQuantFP(group_size=16))
