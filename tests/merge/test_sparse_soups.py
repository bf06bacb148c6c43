"""sparse_soup keeps a shared mask, refuses different ones, and the pruning schedule ends where it should."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

from weft.errors import RecipeError
from weft.merge import linear
from weft.merge.sparse_soups import enforce_masks, phase_sparsity, sparse_soup

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers_in_any_selection():
    RNG.bit_generator.state = START


def masked(mask, count):
    return [(RNG.standard_normal(mask.shape) * mask).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("shape", [(7, 5), (64, 33), (3, 2, 3, 3), (1, 1), (500, 300)])
def test_the_average_keeps_the_mask(shape):
    mask = RNG.random(shape) < 0.2
    models = masked(mask, 3)
    weights = [1.0, 2.0, 0.5]
    got = sparse_soup(models, weights=weights)
    assert got.tobytes() == linear(models, weights=weights).tobytes()
    assert np.count_nonzero(got) <= mask.sum()
    assert not got[~mask].any()
    exact = sum(w * m.astype(np.float64) for w, m in zip(weights, models)) / 3.5
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-6)


def test_negative_zeros_are_zeros():
    a, b = np.float32([[0.0, 1, 2]]), np.float32([[-0.0, 3, 4]])
    np.testing.assert_array_equal(sparse_soup([a, b]), np.float32([[0, 2, 3]]))


def test_one_copy_is_itself():
    (model,) = masked(RNG.random((20, 30)) < 0.1, 1)
    assert sparse_soup([model]).tobytes() == model.tobytes()


def test_different_masks_are_refused_with_their_sparsities():
    a = np.float32([[0, 0, 0, 4], [5, 6, 7, 8]])
    b = np.float32([[0, 1, 2, 4], [5, 6, 7, 0]])
    with pytest.raises(RecipeError, match=r"^layer: .* 37\.5%, 25\.0% .* only 12\.5% are zero in all"):
        sparse_soup([{"layer": a}, {"layer": b}])


def test_intersection_and_union():
    a, b = masked(RNG.random((40, 50)) < 0.3, 1)[0], masked(RNG.random((40, 50)) < 0.3, 1)[0]
    both, mean = (a != 0) & (b != 0), ((a.astype(np.float64) + b) / 2).astype(np.float32)
    np.testing.assert_array_equal(sparse_soup([a, b], masks="intersection"), np.where(both, mean, 0))
    np.testing.assert_array_equal(sparse_soup([a, b], masks="union"), mean)
    same = masked(a != 0, 2)
    assert sparse_soup(same, masks="intersection").tobytes() == sparse_soup(same).tobytes()


def test_dense_tensors_and_vectors_are_not_compared():
    dense = [RNG.standard_normal((20, 20)).astype(np.float32) for _ in range(2)]
    dense[0][3, 3] = 0  # one of 400 by chance
    np.testing.assert_array_equal(sparse_soup(dense, masks="intersection"), linear(dense))
    with pytest.raises(RecipeError):
        sparse_soup(dense, min_sparsity=0)
    biases = [np.float32([0, 1, 2]), np.float32([1, 0, 2])]
    np.testing.assert_array_equal(sparse_soup(biases), [0.5, 0.5, 2])
    for shape in ((), (1,), (0, 4)):
        value = np.zeros(shape, np.float32)
        assert sparse_soup([value, value]).shape == shape
    with pytest.raises(RecipeError):  # pruned against dense
        sparse_soup([np.zeros((4, 4), np.float32), np.ones((4, 4), np.float32)])


def test_wrong_requests():
    model = np.ones((2, 2), np.float32)
    with pytest.raises(RecipeError, match="sum to zero"):
        sparse_soup([model, model], weights=0)
    with pytest.raises(RecipeError, match="between 0"):
        sparse_soup([model, model], weights=[1, -1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    mask = torch.rand(30, 20, generator=torch.Generator().manual_seed(0)) < 0.2
    models = [(torch.randn(30, 20, generator=torch.Generator().manual_seed(i)) * mask).to(dtype) for i in range(3)]
    exact = sparse_soup([m.float().numpy() for m in models])
    assert torch.equal(sparse_soup(models), torch.from_numpy(exact).to(dtype))


# what torch.nn.utils.prune leaves in a state dict


def pruned_copies(count):
    torch.manual_seed(0)
    start = torch.nn.Linear(12, 9)
    prune.l1_unstructured(start, "weight", 0.75)
    copies = []
    for _ in range(count):
        net = torch.nn.Linear(12, 9)
        prune.identity(net, "weight")
        state = {k: v.clone() for k, v in start.state_dict().items()}
        state["weight_orig"] += 0.1 * torch.randn(9, 12)  # training moves the hidden copies of pruned weights too
        net.load_state_dict(state)
        copies.append(net)
    return copies


def test_hidden_copies_of_pruned_weights_are_cleared():
    nets = pruned_copies(3)
    soup = sparse_soup([net.state_dict() for net in nets])
    mask = nets[0].state_dict()["weight_mask"]
    assert torch.equal(soup["weight_mask"], mask)
    assert not soup["weight_orig"][mask == 0].any()
    hidden = torch.stack([net.state_dict()["weight_orig"] for net in nets])
    assert hidden[:, mask == 0].any()
    torch.testing.assert_close(soup["weight_orig"], (hidden * mask).mean(0))
    nets[0].load_state_dict(soup)
    x = torch.randn(3, 12)
    torch.testing.assert_close(nets[0](x), torch.nn.functional.linear(x, soup["weight_orig"], soup["bias"]))


def test_masks_that_differ_are_joined_as_asked():
    one, two = pruned_copies(2)
    state = one.state_dict()
    moved = two.state_dict() | {"weight_mask": two.weight_mask.roll(1, 0)}
    with pytest.raises(RecipeError, match="weight_orig"):
        sparse_soup([state, moved])
    for rule, joint in (("intersection", torch.minimum), ("union", torch.maximum)):
        soup = sparse_soup([state, moved], masks=rule)
        expected = joint(state["weight_mask"], moved["weight_mask"])
        assert torch.equal(soup["weight_mask"], expected)
        assert torch.equal(soup["weight_orig"] != 0, expected != 0)


def test_enforce_masks_touches_only_pairs():
    state = {"a_orig": np.ones(2, np.float32), "b_mask": np.zeros(2, np.float32), "c": np.ones(2, np.float32)}
    assert all(enforce_masks(state)[name] is value for name, value in state.items())


# the schedule


@pytest.mark.parametrize(("target", "phases"), [(0.9, 3), (0.98, 5), (0.5, 1), (0.0, 2)])
def test_each_phase_removes_the_same_share_of_the_rest(target, phases):
    after = (0.0, *phase_sparsity(target, phases))
    assert len(after) == phases + 1
    assert after[-1] == target
    shares = [1 - (1 - b) / (1 - a) for a, b in pairwise(after)]
    np.testing.assert_allclose(shares, 1 - (1 - target) ** (1 / phases), rtol=1e-12, atol=1e-15)


def test_iterative_magnitude_pruning_follows_the_schedule():
    weights = RNG.standard_normal((37, 41)).astype(np.float32)
    for wanted in phase_sparsity(0.95, 4):
        count = round(wanted * weights.size)
        weights.reshape(-1)[np.argsort(np.abs(weights), axis=None)[:count]] = 0
        copies = [np.where(weights != 0, weights + 0.01 * RNG.standard_normal(weights.shape), 0) for _ in range(3)]
        weights = sparse_soup([c.astype(np.float32) for c in copies])
        assert np.mean(weights == 0) == pytest.approx(wanted, abs=1 / weights.size)


@pytest.mark.parametrize(("target", "phases"), [(1.0, 3), (-0.1, 3), (0.5, 0)])
def test_impossible_schedules(target, phases):
    with pytest.raises(RecipeError):
        phase_sparsity(target, phases)
