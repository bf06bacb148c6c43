"""HQQ: its equations step by step in float64, the best zero point of all by trying them, and what no search may lose."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from weft.errors import RecipeError
from weft.quantize import HQQ, hqq_codes


def weights(rows: int = 16, columns: int = 64) -> Tensor:
    """Of a law with heavy tails."""
    law = torch.distributions.Laplace(torch.tensor(0.0, dtype=torch.float64), 0.02)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return law.sample((rows, columns))


def error(weight: Tensor, found: Tensor, size: int, p: float) -> Tensor:
    return (weight - found.double()).abs().pow(p).unflatten(1, (-1, size)).sum(-1)


def by_equations(weight: Tensor, config: HQQ) -> list[Tensor]:
    """The zero points of all steps, group by group and number by number."""
    zeros = []
    for row in weight.unflatten(1, (-1, config.group_size)).flatten(0, 1).tolist():
        top = 2**config.bits - 1
        sigma = top / (max(row) - min(row))
        z, beta, steps = -min(row) * sigma, config.beta, []
        for _ in range(config.steps + 1):
            steps.append(z)
            total = 0.0
            for w in row:
                q = min(max(round(w * sigma + z), 0), top)
                x = w - (q - z) / sigma
                size = max(abs(x) - abs(x) ** (config.p - 1) / beta, 0.0) if x else 0.0
                total += q - (w - (size if x > 0 else -size)) * sigma
            z, beta = total / len(row), beta * config.kappa
        zeros.append(torch.tensor(steps, dtype=torch.float64))
    return zeros


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_zero_points_are_the_best_of_the_steps_of_the_equations(bits: int) -> None:
    weight, config = weights(), HQQ(bits=bits, group_size=32)
    made = hqq_codes(weight, config)
    groups = weight.unflatten(1, (-1, 32)).flatten(0, 1)
    for group, zeros, zero, scale in zip(
        groups, by_equations(weight, config), made.zero.flatten(), made.scale.flatten()
    ):
        s = (group.max() - group.min()) / (2**bits - 1)
        assert float(scale) == pytest.approx(float(s), rel=1e-6)
        losses = [((((group / s + z).round().clamp(0, 2**bits - 1) - z) * s - group).abs() ** 0.7).sum() for z in zeros]
        best = int(torch.stack(losses).argmin())
        # float32 zero points may take another of two steps that are as good
        mine = (((group / s + zero.double()).round().clamp(0, 2**bits - 1) - zero.double()) * s - group).abs() ** 0.7
        assert float(mine.sum()) == pytest.approx(float(losses[best]), rel=1e-3)
        assert float((zeros - float(zero)).abs().min()) < 1e-3


def test_more_steps_never_hurt_any_group() -> None:
    weight = weights()
    errors = [error(weight, hqq_codes(weight, HQQ(2, 32, steps=n)).dequantize(), 32, 0.7) for n in range(12)]
    for before, after in pairwise(errors):
        assert bool((after <= before * (1 + 1e-6)).all())
    assert float(errors[-1].sum()) < 0.96 * float(errors[0].sum())


def test_beside_the_best_zero_point_of_all() -> None:
    """Between zero points that meet a weight exactly the error is concave, so one of these is the best of all."""
    weight = weights(32, 16)
    for bits, way in ((1, 0.7), (2, 0.4)):
        config = HQQ(bits=bits, group_size=16)
        made = hqq_codes(weight, config)
        found = error(weight, made.dequantize(), 16, 0.7)[:, 0]
        began = error(weight, hqq_codes(weight, HQQ(bits=bits, group_size=16, steps=0)).dequantize(), 16, 0.7)[:, 0]
        top, scale = 2**bits - 1, made.scale.double().unsqueeze(-1)
        scaled = weight.unsqueeze(-1) / scale  # (32, 16, 1)
        tries = (torch.arange(2**bits) - scaled).flatten(1).unsqueeze(1)  # (32, 1, zero points)
        codes = (scaled + tries).round().clamp(0, top)
        best = ((codes - tries) * scale - weight.unsqueeze(-1)).abs().pow(0.7).sum(1).amin(1)
        assert bool((best <= found * (1 + 1e-4)).all())
        # this share of the way from the start to the best of all
        assert float((began - found).sum()) > way * float((began - best).sum()), bits


def test_codes_are_the_nearest_of_the_grid() -> None:
    weight = weights().float()
    for config in (HQQ(3, 16), HQQ(3, 16, round_zero=True), HQQ(4, 16, "float16"), HQQ(4, 16, "bfloat16")):
        made = hqq_codes(weight, config)
        s, z = (v.double().repeat_interleave(16, 1).unsqueeze(-1) for v in (made.scale, made.zero))
        values = (torch.arange(2**config.bits) - z) * s
        nearest = (values - weight.double().unsqueeze(-1)).abs().amin(-1)
        assert bool(((made.dequantize().double() - weight.double()).abs() <= nearest + 1e-6).all())
        assert str(made.zero.dtype) == f"torch.{config.scale_dtype}"
        if config.round_zero:
            assert torch.equal(made.zero, made.zero.round())


def test_groups_of_one_value_and_small_weights() -> None:
    weight = torch.tensor([[0.0] * 4, [3.0] * 4, [-2.5] * 4, [1e-30] * 4])
    assert torch.equal(hqq_codes(weight, HQQ(group_size=4)).dequantize(), weight)
    small = weights().float() * 1e-6
    moved = hqq_codes(small, HQQ(bits=8, group_size=16)).dequantize()
    assert float((moved - small).norm() / small.norm()) < 0.01


def test_what_is_refused() -> None:
    for bad in ({"p": 0}, {"p": 1.1}, {"beta": 0}, {"kappa": 0.5}, {"steps": -1}, {"bits": 9}, {"group_size": -1}):
        with pytest.raises(RecipeError):
            HQQ(**bad)
    far = torch.tensor([[1000.0, 1000.001, 1000.002, 1000.003]])
    with pytest.raises(RecipeError, match="float16 cannot hold"):
        hqq_codes(far, HQQ(bits=8, group_size=0, scale_dtype="float16"))
