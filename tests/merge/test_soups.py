"""Uniform soups are the mean; greedy soups against a running mean, and driven over files."""

import math

import numpy as np
import pytest
import torch

import weft
from weft.errors import RecipeError, ShapeError
from weft.merge import linear
from weft.merge.soups import Selection, Step, greedy_soup, select_greedily, uniform_soup

SHAPES = [(7, 5), (5,), (), (1,), (0, 3), (2, 3, 2, 2)]


def states(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {f"t{i}": np.asarray(rng.standard_normal(s), np.float32) for i, s in enumerate(SHAPES)} for _ in range(count)
    ]


def distance_to(goal):
    """A score: the nearer to ``goal``, the higher."""

    def score(state):
        return -sum(float(np.square(np.asarray(state[n], np.float64) - goal[n]).sum()) for n in goal)

    return score


# uniform


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_uniform_is_the_mean(count):
    models = states(count)
    for name, value in uniform_soup(models).items():
        stack = np.stack([m[name].astype(np.float64) for m in models])
        # the weight 1/K, each product and each sum are rounded once
        np.testing.assert_array_less(
            np.abs(value - stack.mean(0)), (count + 2) * 2.0**-24 * np.abs(stack).mean(0) + 1e-45
        )
        assert value.shape == models[0][name].shape


def test_uniform_is_linear_with_equal_weights():
    models = states(5)
    expected = linear(models)
    for name, value in uniform_soup(models).items():
        assert value.tobytes() == expected[name].tobytes()


def test_one_model_is_itself():
    (model,) = states(1)
    for name, value in uniform_soup([model]).items():
        assert value.tobytes() == model[name].tobytes()
        assert not np.shares_memory(value, model[name])


def test_the_order_of_models_does_not_matter_to_uniform():
    models = states(6)
    forward, backward = uniform_soup(models), uniform_soup(models[::-1])
    for name, value in forward.items():
        size = sum(np.abs(m[name]) for m in models)
        np.testing.assert_array_less(np.abs(value - backward[name]), 2 * 6 * 2.0**-24 * size + 1e-45)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_drift(dtype):
    # a running mean in bfloat16 of 300 models loses the small changes; one rounding of the exact mean does not
    models = [torch.full((4,), 1 + 2.0**-7 * (i % 2)).to(dtype) for i in range(300)]
    assert torch.equal(uniform_soup(models), torch.full((4,), 1 + 2.0**-8).to(dtype))


# greedy


def running_mean_soup(models, score, accept_equal=False):
    """Independent: the recipe as a loop over a running mean in float64."""
    scores = [score(m) for m in models]
    order = sorted(range(len(models)), key=lambda i: -scores[i])
    members, best = [order[0]], scores[order[0]]
    mean = {n: v.astype(np.float64) for n, v in models[order[0]].items()}
    for i in order[1:]:
        n = len(members)
        candidate = {k: n / (n + 1) * mean[k] + models[i][k] / (n + 1) for k in mean}
        value = score(candidate)
        if value > best or (accept_equal and value == best):
            members, mean, best = [*members, i], candidate, value
    return members, mean, best


@pytest.mark.parametrize("seed", range(5))
def test_greedy_equals_a_running_mean(seed):
    models, goal = states(8, seed), {n: 0.1 * v for n, v in states(1, 100 + seed)[0].items()}
    soup = greedy_soup(models, distance_to(goal))
    members, mean, best = running_mean_soup(models, distance_to(goal))
    assert list(soup.members) == members
    assert len(members) > 1
    assert soup.score == pytest.approx(best, rel=1e-5)  # sums of float32 roundings against float64
    for name, value in soup.state.items():
        np.testing.assert_allclose(value, mean[name], rtol=1e-5, atol=1e-6)


def test_the_history():
    models, goal = states(8), {n: 0.1 * v for n, v in states(1, 100)[0].items()}
    score = distance_to(goal)
    soup = greedy_soup({f"run {i}": m for i, m in enumerate(models)}, score)
    kept = [step.score for step in soup.history if step.accepted]
    assert kept == sorted(set(kept))
    assert [step.candidate for step in soup.history if step.accepted] == list(soup.members)
    assert sorted(step.candidate for step in soup.history) == sorted(soup.order_scores)
    assert soup.score == kept[-1] == score(soup.state)
    assert soup.score >= max(score(m) for m in models)
    singles = [soup.order_scores[step.candidate] for step in soup.history]
    assert singles == sorted(singles, reverse=True)


def test_the_state_is_the_uniform_soup_of_the_members():
    models = states(8)
    soup = greedy_soup(models, distance_to({n: np.zeros_like(v) for n, v in models[0].items()}))
    expected = uniform_soup([models[i] for i in soup.members])
    for name, value in soup.state.items():
        assert value.tobytes() == expected[name].tobytes()


def test_one_candidate():
    (model,) = states(1)
    soup = greedy_soup([model], lambda state: 3)
    assert soup.members == (0,)
    assert soup.history == (Step(0, 3.0, True),)
    assert all(soup.state[n].tobytes() == v.tobytes() for n, v in model.items())


def test_equal_scores():
    assert select_greedily("abc", lambda names: 1.0).members == ("a",)
    assert select_greedily("abc", lambda names: 1.0, accept_equal=True).members == ("a", "b", "c")


def test_number_of_evaluations():
    asked = []
    select_greedily(["a", "b", "c"], lambda names: asked.append(tuple(names)) or -len(asked))
    assert asked == [("a",), ("b",), ("c",), ("a", "b"), ("a", "c")]
    asked.clear()
    chosen = select_greedily(
        ["a", "b", "c"], lambda names: asked.append(tuple(names)) or len(asked), order_scores={"a": 1, "b": 3, "c": 2}
    )
    assert asked == [("b",), ("b", "c"), ("b", "c", "a")]
    assert chosen == Selection(
        ("b", "c", "a"),
        3.0,
        (Step("b", 1.0, True), Step("c", 2.0, True), Step("a", 3.0, True)),
        {"a": 1.0, "b": 3.0, "c": 2.0},
    )


def test_a_diverged_model_is_never_taken():
    scores = {"a": math.nan, "b": 1.0, "c": 0.5}
    chosen = select_greedily(list(scores), lambda names: math.nan if "a" in names else sum(scores[n] for n in names))
    assert chosen.members == ("b", "c")
    assert [step.candidate for step in chosen.history] == ["b", "c", "a"]
    with pytest.raises(RecipeError, match="NaN"):
        select_greedily(["a"], lambda names: math.nan)


@pytest.mark.parametrize(
    ("candidates", "order_scores", "message"),
    [([], None, "at least one"), (["a", "a"], None, "twice"), (["a", "b"], {"a": 1.0}, "'b' has no score")],
)
def test_wrong_requests(candidates, order_scores, message):
    with pytest.raises(RecipeError, match=message):
        select_greedily(candidates, lambda names: 1.0, order_scores=order_scores)


def test_models_of_different_names():
    with pytest.raises(ShapeError, match="same names"):
        greedy_soup([{"a": np.zeros(1, np.float32)}, {"b": np.zeros(1, np.float32)}], lambda state: len(state))


def test_counters_and_recalibration_of_a_torch_model():
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(3)]
    for i, net in enumerate(nets):
        net(torch.randn(10, 3) + i)
    x = torch.randn(64, 3)

    def recalibrate(state):
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, momentum=None))
        net.load_state_dict(state)
        net[1].reset_running_stats()
        net.train()(x)
        return net.state_dict()

    def score(state):
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        net.load_state_dict(state)
        return -float(net.eval()(x).detach().mean(0).abs().sum())

    soup = greedy_soup([n.state_dict() for n in nets], score, recalibrate=recalibrate, accept_equal=True)
    assert soup.state["1.num_batches_tracked"].dtype == torch.int64
    assert soup.score == score(soup.state)
    # with statistics of x itself the outputs have mean zero up to float32
    assert soup.score > -1e-5
    plain = greedy_soup([n.state_dict() for n in nets], score)
    assert plain.state["1.num_batches_tracked"] == nets[0].state_dict()["1.num_batches_tracked"]
    assert plain.score < -1e-3


def test_the_same_selection_over_files(tmp_path):
    models = {f"m{i}": m for i, m in enumerate(states(4))}
    score = distance_to({n: np.zeros_like(v) for n, v in models["m0"].items()})

    def score_of(names):
        step = {"method": "uniform_soup", "models": list(names)}
        folder = tmp_path / "-".join(names)
        weft.run({"steps": [step]}, folder, models=models)
        with weft.open(folder) as written:
            return score({n: t.numpy() for n, t in written.items()})

    by_files = select_greedily(list(models), score_of)
    in_memory = greedy_soup(models, score)
    assert by_files.members == in_memory.members
    assert by_files.history == in_memory.history
