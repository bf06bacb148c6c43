"""JLCM: both gradients against autograd and by hand, footprints in bytes, and tables against grids."""

from typing import Any

import pytest
import torch
from torch import Tensor

from weft.errors import RecipeError
from weft.quantize import JLCM, RTN, fit_grid, jlcm_footprint, quantize
from weft.quantize.jlcm import LearnedTables, choose, cluster_rows
from weft.quantize.reconstruct import reconstruct_layer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight_of(rows: int = 32, columns: int = 48) -> Tensor:
    """Half of the rows normal, half with heavy tails."""
    weight = torch.randn(rows, columns, generator=generator(1))
    weight[::2] = weight[::2] ** 3
    return weight


def soft_of(weight: Tensor, **values: Any) -> LearnedTables:
    return LearnedTables(weight, JLCM(**values), generator())


def parts(columns: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = torch.randn(3, columns, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
    levels = torch.randn(2, 4, generator=generator(1), dtype=torch.float64, requires_grad=True)
    candidates = torch.rand(3, columns, 4, generator=generator(2)).argsort(2)[..., :2].to(torch.uint8)
    return logits, levels, candidates, torch.tensor([0, 1, 0]), torch.tensor([0.5, 0.7], dtype=torch.float64)


def test_the_default_gradient_is_autograds() -> None:
    logits, levels, candidates, table, gap = parts()
    towards = torch.randn(3, 5, generator=generator(3), dtype=torch.float64)
    made = choose(logits, levels, candidates, table, gap, proximal=False)
    by_logits, by_levels = torch.autograd.grad((made * towards).sum(), (logits, levels))
    values = levels[table[:, None, None], candidates.long()]
    mixture = (logits.softmax(2) * values.detach()).sum(2)
    torch.testing.assert_close(by_logits, torch.autograd.grad((mixture * towards).sum(), logits)[0])
    hard = values.gather(2, logits.argmax(2, keepdim=True)).squeeze(2)
    torch.testing.assert_close(by_levels, torch.autograd.grad((hard * towards).sum(), levels)[0])
    assert torch.equal(made, hard)


def test_the_proximal_gradient_by_hand() -> None:
    """The sign of the default one, smaller the farther a level is; with a gap without end, the sign alone."""
    logits, levels, candidates, table, gap = parts()
    values = levels.detach()[table[:, None, None], candidates.long()]
    shares = logits.detach().softmax(2)
    away = values - (shares * values).sum(2, keepdim=True)
    for tau, size in (
        (gap, away.sign() / (1 + away.abs() / gap[table][:, None, None])),
        (gap * torch.inf, away.sign()),
    ):
        made = choose(logits, levels, candidates, table, tau, proximal=True)
        (found,) = torch.autograd.grad(made.sum(), logits)
        torch.testing.assert_close(found, shares * size)
    default = torch.autograd.grad(choose(logits, levels, candidates, table, gap, False).sum(), logits)[0]
    assert torch.equal(found.sign(), default.sign())


def test_far_levels_win_by_autograd_and_near_ones_by_proximity() -> None:
    """Levels 0, 1 and 10 with equal shares, and an output that is to rise: which logit rises the most."""
    for proximal, expected in ((False, 2), (True, 1)):
        logits = torch.tensor([[[0.5, 0.4, 0.0]]], requires_grad=True)
        levels = torch.tensor([[0.0, 1.0, 1.9]]) if proximal else torch.tensor([[0.0, 1.0, 10.0]])
        some = torch.arange(3).reshape(1, 1, 3), torch.zeros(1, dtype=torch.long), torch.ones(1)
        choose(logits, levels, *some, proximal).backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        per_share = logits.grad[0, 0] / logits.detach()[0, 0].softmax(0)
        assert int(per_share.argmax()) == expected


@pytest.mark.parametrize(("shape", "levels", "tables"), [((64, 128), 16, 4), ((12, 40), 8, 1), ((5, 7), 4, 3)])
def test_the_footprint_is_the_bytes(shape: tuple[int, int], levels: int, tables: int) -> None:
    packed = soft_of(torch.randn(shape, generator=generator()), levels=levels, tables=tables).packed()
    assert sum(t.nbytes for t in packed.tensors().values()) == jlcm_footprint(shape, levels, tables)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_are_nearer_than_grids(bits: int) -> None:
    weight = weight_of()
    grid = RTN(bits=bits, group_size=0)
    uniform = (quantize(weight, *fit_grid(weight, grid), grid).dequantize() - weight).square().mean()
    one, four = (
        (soft_of(weight, levels=2**bits, tables=t).packed().dequantize() - weight).square().mean() for t in (1, 4)
    )
    assert one < uniform
    assert four < one


def test_each_weight_starts_at_the_nearest_level_of_its_rows_table() -> None:
    weight = weight_of()
    soft = soft_of(weight, levels=8, tables=3)
    packed = soft.packed()
    assert packed.table is not None
    torch.testing.assert_close(soft().detach(), packed.dequantize())
    levels = soft.levels.detach()[soft.table].unsqueeze(1) * soft.scale.detach().unsqueeze(2)  # (out, 1, levels)
    nearest = (weight.unsqueeze(2) - levels).abs().min(2).values
    torch.testing.assert_close((packed.dequantize() - weight).abs(), nearest, rtol=1e-4, atol=1e-6)


def test_rows_that_are_spread_alike_share_a_table() -> None:
    weight = weight_of(64, 512)
    made = cluster_rows(weight / weight.abs().amax(1, keepdim=True), 2, generator())
    assert len(made[::2].unique()) == len(made[1::2].unique()) == 1
    assert made[0] != made[1]


@pytest.mark.parametrize("proximal", [True, False])
def test_learning_both_lowers_the_outputs_error(proximal: bool) -> None:
    weight = torch.randn(32, 48, generator=generator(1))
    x = torch.randn(400, 48, generator=generator(2)) + torch.randn(400, 1, generator=generator(3))  # a part in common
    gram = x.T @ x
    soft = soft_of(weight, levels=4, tables=2, proximal=proximal, steps=200)
    before = soft.packed()
    start, end = reconstruct_layer(weight, gram, soft, soft.config.descent())
    after = soft.packed()
    assert end < 0.7 * start
    assert not torch.equal(before.levels, after.levels)
    assert not torch.equal(before.codes, after.codes)
    assert float((x @ (after.dequantize() - weight).T).square().mean()) == pytest.approx(
        end * float((x @ weight.T).square().mean()), rel=1e-3
    )


def test_what_is_refused() -> None:
    bad: list[dict[str, Any]] = [
        {"levels": 1}, {"levels": 257}, {"tables": 0}, {"steps": -1}, {"samples": 0}, {"rate": -1},
        {"codebook_rate": float("inf")},
    ]  # fmt: skip
    for wrong in bad:
        with pytest.raises(RecipeError):
            JLCM(**wrong)
    with pytest.raises(RecipeError, match="NaN"):
        soft_of(torch.full((2, 2), float("nan")))
