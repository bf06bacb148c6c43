"""Projections of gradients, and the groups and sizes that follow from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weft.adapt.galore import (
    carried,
    low_rank_basis,
    project,
    project_back,
    projected_groups,
    projected_sides,
)
from weft.errors import RecipeError

SHAPES = [(7, 4), (4, 7), (5, 5)]


def gradient(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_basis_keeps_as_much_as_any_can(shape: tuple[int, int], rank: int) -> None:
    g = gradient(shape)
    values = np.linalg.svd(g.numpy(), compute_uv=False)
    for side in ("left", "right"):
        basis = low_rank_basis(g, rank, side)
        bases = (basis, None) if side == "left" else (None, basis)
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
        # Eckart and Young: no projection of that rank leaves less than the remaining singular values
        left = (g - project_back(project(g, *bases), *bases)).square().sum().item()
        assert left == pytest.approx((values[rank:] ** 2).sum(), rel=1e-10)


def test_signs_do_not_depend_on_the_library() -> None:
    g = gradient((6, 4))
    for side in ("left", "right"):
        basis = low_rank_basis(g, 3, side)
        assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())
        torch.testing.assert_close(low_rank_basis(-g, 3, side), basis)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_loses_nothing(shape: tuple[int, int]) -> None:
    g, other = gradient(shape), gradient(shape, 1)
    bases = {side: low_rank_basis(g, 99, side) for side in ("left", "right")}
    for projection in ("auto", "left", "right", "both"):
        pair = tuple(bases[s] if s in projected_sides(shape, projection) else None for s in ("left", "right"))
        assert project(g, *pair).numel() <= g.numel()
        torch.testing.assert_close(project_back(project(g, *pair), *pair), g)
        if projection == "auto":  # the smaller side's basis is complete, for any gradient
            torch.testing.assert_close(project_back(project(other, *pair), *pair), other)


def test_moments_are_those_of_the_turned_gradients() -> None:
    old = tuple(low_rank_basis(gradient((6, 5), 1), 3, side) for side in ("left", "right"))
    new = tuple(low_rank_basis(gradient((6, 5), 2), 3, side) for side in ("left", "right"))
    # gradients inside the old bases, whose entries there are independent
    low = torch.randn(200_000, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = low * torch.arange(1, 10).reshape(3, 3) + 0.0
    seen = project(project_back(low, *old), *new)
    first, second = carried(low.mean(0), low.square().mean(0), old, new)
    torch.testing.assert_close(first, seen.mean(0))  # exact
    torch.testing.assert_close(second, seen.square().mean(0), rtol=0.02, atol=0)  # the sample's correlations aside
    same = carried(low[0], low[1].square(), old, old)
    torch.testing.assert_close(same, (low[0], low[1].square()))


@pytest.mark.parametrize(
    ("shape", "rank", "side"), [((3,), 1, "left"), ((3, 3), 0, "left"), ((3, 3), 1, "up"), ((0, 3), 1, "left")]
)
def test_wrong_bases_are_refused(shape: tuple[int, ...], rank: int, side: str) -> None:
    with pytest.raises(RecipeError, match="basis is of a matrix"):
        low_rank_basis(torch.ones(shape), rank, side)


def test_a_gradient_of_nan_or_zero_has_a_basis() -> None:
    for g in (torch.full((4, 3), torch.nan), torch.full((4, 3), torch.inf), torch.zeros(4, 3)):
        basis = low_rank_basis(g, 2, "right")
        torch.testing.assert_close(basis.T @ basis, torch.eye(2))
    assert bool(project(torch.full((4, 3), torch.nan), None, basis).isnan().all())


def test_groups_hold_every_parameter_that_trains_once() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict(
        {
            "first": nn.Linear(12, 8),
            "transposed": Conv1D(16, 12),
            "small": nn.Linear(12, 3),
            "frozen": nn.Linear(12, 8),
            "kernel": nn.Conv2d(4, 8, 3),
            "lm_head": nn.Linear(8, 12),
        }
    )
    model["frozen"].requires_grad_(False)
    groups = projected_groups(model, 3)
    assert [(g.get("rank"), g.get("output_axis"), len(g["params"])) for g in groups] == [
        (3, 0, 1), (3, 1, 1), (None, None, 8),
    ]  # fmt: skip
    assert groups[0]["params"][0] is model["first"].weight
    assert groups[1]["params"][0] is model["transposed"].weight
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(projected_groups(model, 3, where="*", ignore="first")[0]["params"]) == 2  # the kernel and the head


@pytest.mark.parametrize(("rank", "where"), [(8, "all-linear"), (2, "frist")])
def test_no_projection_is_refused(rank: int, where: str) -> None:
    with pytest.raises(RecipeError, match="No weight is projected"):
        projected_groups(nn.ModuleDict({"first": nn.Linear(12, 8)}), rank, where=where)
