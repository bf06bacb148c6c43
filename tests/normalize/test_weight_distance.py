"""Distances from the start against sums by hand, and fits against scipy."""

import math

import pytest
import torch
from torch import nn

from weft.errors import RecipeError
from weft.normalize import WeightDistance, fit_distance


def test_fits_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    steps = [1, 2, 5, 9, 40, 200, 1000]
    distances = (1 + torch.rand(7, generator=generator, dtype=torch.float64)).cumsum(0).tolist()
    fit = fit_distance(steps, distances)
    for ours, transform in ((fit.log, math.log), (fit.sqrt, math.sqrt)):
        theirs = stats.linregress([transform(t) for t in steps], distances)
        assert ours.slope == pytest.approx(theirs.slope, rel=1e-12)
        assert ours.intercept == pytest.approx(theirs.intercept, rel=1e-12)
        assert ours.r_squared == pytest.approx(theirs.rvalue**2, rel=1e-12)
    assert fit.points == 7


def test_either_law_is_found_where_it_holds() -> None:
    steps = list(range(1, 200))
    logarithmic = fit_distance(steps, [2 + 3 * math.log(t) for t in steps])
    assert (logarithmic.law, logarithmic.log.slope, logarithmic.log.intercept) == (
        "log", pytest.approx(3), pytest.approx(2)
    )  # fmt: skip
    assert logarithmic.log.r_squared == pytest.approx(1, abs=1e-12)
    assert logarithmic.sqrt.r_squared < 0.95
    ordinary = fit_distance(steps, [2 + 3 * math.sqrt(t) for t in steps])
    assert (ordinary.law, ordinary.sqrt.slope) == ("sqrt", pytest.approx(3))
    assert fit_distance([1, 2, 3], [1.0, 1.0, 1.0]).log.r_squared == 1


def test_a_random_walk_is_ordinary_diffusion() -> None:
    """After t Gaussian steps of size s in D dimensions the distance is s √(D t), within 1 / sqrt(2 D) of it."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(200, 100, bias=False)
    recorder = WeightDistance(model)
    for t in range(1, 301):
        with torch.no_grad():
            model.weight.add_(0.01 * torch.randn(100, 200, generator=generator))
        recorder.record(t)
    fit = recorder.fit()
    assert fit.law == "sqrt"
    assert fit.sqrt.slope == pytest.approx(0.01 * math.sqrt(20_000), rel=0.03)
    assert fit.sqrt.r_squared > 0.999
    assert fit.log.r_squared < 0.95


def test_distances_are_over_all_parameters_that_train() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    model[1].bias.requires_grad_(False)
    recorder = WeightDistance(model)
    start = [p.detach().double().clone() for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.ones_like(parameter))
    recorder.record(7)
    now = [p.detach().double() for p in model.parameters() if p.requires_grad]
    by_hand = math.sqrt(sum(float(((a - b).bfloat16().double() ** 2).sum()) for a, b in zip(now, start)))
    assert recorder.distances == [pytest.approx(by_hand, rel=1e-12)]
    assert recorder.steps == [7]


def test_a_phase_is_fitted_alone() -> None:
    model = nn.Linear(1, 1, bias=False)
    recorder = WeightDistance(model)
    for t in range(1, 21):
        with torch.no_grad():  # logarithmic up to step 10, then it runs away
            model.weight.copy_(recorder.start["weight"] + math.log(t) + max(0, t - 10) ** 2)
        recorder.record(t)
    assert recorder.fit(last=10).log.slope == pytest.approx(1, rel=1e-5)
    assert recorder.fit(last=10).points == 10
    assert recorder.fit(first=12).points == 9
    assert recorder.fit().log.r_squared < 0.8


def test_bad_requests() -> None:
    model = nn.Linear(2, 2)
    recorder = WeightDistance(model)
    recorder.record(2)
    for step in (2, 1, 0):
        with pytest.raises(RecipeError, match=f"count up from 1, got {step} after 2"):
            recorder.record(step)
    with pytest.raises(RecipeError, match="3 different steps at least, got 1"):
        recorder.fit()
    del model.bias
    with pytest.raises(RecipeError, match="bias is no parameter of the model any more"):
        recorder.record(3)
    with pytest.raises(RecipeError, match="none can move"):
        WeightDistance(nn.ReLU())
    with pytest.raises(RecipeError, match="3 steps and 2 distances"):
        fit_distance([1, 2, 3], [1.0, 2.0])
    for steps, distances in (([0, 1, 2], [0.0, 1.0, 2.0]), ([1, 2, 3], [0.0, 1.0, math.nan])):
        with pytest.raises(RecipeError, match="count from 1 and distances are finite"):
            fit_distance(steps, distances)
