"""k-means: scikit-learn on small cases, brute force, and what every step promises."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from weft.quantize.kmeans import affordable, as_half, nearest, weighted_kmeans


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inertia(vectors: Tensor, table: Tensor, weights: Tensor) -> float:
    return float(((vectors - table[nearest(vectors, table)]).square().sum(1) * weights).sum())


@pytest.mark.parametrize("length", [1, 2, 5])
def test_nearest_by_trying_all(length: int) -> None:
    vectors = torch.randn(3000, length, generator=generator(), dtype=torch.float64)
    table = torch.randn(200, length, generator=generator(1), dtype=torch.float64)
    brute = (vectors[:, None] - table).square().sum(2).argmin(1)
    assert torch.equal(nearest(vectors, table), brute)  # in several parts


@pytest.mark.parametrize(("count", "length", "entries"), [(500, 2, 8), (2000, 4, 32), (300, 1, 16)])
def test_as_good_as_scikit_learn(count: int, length: int, entries: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    vectors = torch.randn(count, length, generator=generator())
    weights = torch.rand(count, generator=generator(1))
    ours = min(
        inertia(vectors, weighted_kmeans(vectors, entries, weights, generator=generator(s), tolerance=0), weights)
        for s in range(5)
    )
    found = cluster.KMeans(entries, n_init=5, random_state=0, tol=0).fit(vectors.numpy(), sample_weight=weights.numpy())
    assert ours < 1.08 * found.inertia_  # ends differ by more from one draw of starts to the next


def test_a_step_from_scikit_learns_end_stays_there() -> None:
    """Our end is a fixed point of scikit-learn's Lloyd steps: nearest entries and weighted means agree."""
    cluster = pytest.importorskip("sklearn.cluster")
    vectors, weights = torch.randn(400, 3, generator=generator()).double(), torch.rand(400, generator=generator(1))
    table = weighted_kmeans(vectors, 10, weights, generator=generator(), tolerance=0, iterations=500)
    found = cluster.KMeans(10, init=table.numpy(), n_init=1, max_iter=1).fit(
        vectors.numpy(), sample_weight=weights.numpy()
    )
    torch.testing.assert_close(torch.from_numpy(found.cluster_centers_), table, rtol=1e-6, atol=1e-6)
    assert (found.labels_ == nearest(vectors, table).numpy()).all()


def test_more_steps_are_never_worse() -> None:
    vectors, weights = torch.randn(600, 3, generator=generator()), torch.rand(600, generator=generator(1))
    errors = [
        inertia(
            vectors, weighted_kmeans(vectors, 20, weights, generator=generator(), iterations=n, tolerance=0), weights
        )
        for n in (1, 2, 3, 5, 10, 50)
    ]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_as_many_entries_as_different_vectors_are_exact() -> None:
    vectors = torch.randn(7, 3, generator=generator())[torch.randint(7, (100,), generator=generator())]
    for entries in (7, 12):
        table = weighted_kmeans(vectors, entries, generator=generator())
        torch.testing.assert_close(table[nearest(vectors, table)], vectors, rtol=1e-6, atol=0)
    same = weighted_kmeans(torch.ones(5, 2), 4, generator=generator())
    assert torch.equal(same, torch.ones(4, 2))


def test_weights_are_copies() -> None:
    """A whole weight is as good as so many copies: the means of the end are the same."""
    vectors, counts = (
        torch.randn(60, 2, generator=generator()).double(),
        torch.randint(1, 5, (60,), generator=generator()),
    )
    table = weighted_kmeans(vectors, 5, counts.double(), generator=generator(), tolerance=0)
    copies = vectors.repeat_interleave(counts, 0)
    found = nearest(copies, table)
    means = torch.stack([copies[found == k].mean(0) for k in range(5)])
    torch.testing.assert_close(means, table)
    assert weighted_kmeans(vectors, 5, torch.zeros(60), generator=generator()).isfinite().all()


def test_parts_of_much_data_come_near_all_of_it() -> None:
    vectors = torch.randn(20000, 2, generator=generator())
    ones = torch.ones(20000)
    whole = inertia(vectors, weighted_kmeans(vectors, 16, generator=generator(), batch=20000), ones)
    parts = inertia(vectors, weighted_kmeans(vectors, 16, generator=generator(), batch=1000), ones)
    assert parts < 1.06 * whole
    first, second = (weighted_kmeans(vectors, 16, generator=generator(3), batch=1000) for _ in range(2))
    assert torch.equal(first, second)


def test_an_entry_that_none_is_nearest_to_is_used_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From starts that are all one point: the first step leaves all but one without vectors."""
    vectors = torch.randn(400, 2, generator=generator())
    plain = inertia(vectors, weighted_kmeans(vectors, 8, generator=generator()), torch.ones(400))
    monkeypatch.setattr("weft.quantize.kmeans._starts", lambda v, k, w, g: v[:1].repeat(k, 1))
    for iterations, most in ((1, 8), (100, 1.3)):
        table = weighted_kmeans(vectors, 8, generator=generator(), iterations=iterations)
        assert len(nearest(vectors, table).unique()) == 8
        assert inertia(vectors, table, torch.ones(400)) < most * plain


def test_entries_that_a_layer_can_afford() -> None:
    assert affordable([256], 4, (4096, 4096), 0.25) == ([256], ())
    for shape, length, overhead in (((64, 64), 4, 0.25), ((384, 384), 6, 0.1), ((7, 9), 3, 2.0)):
        (entries, second), notes = affordable([4096, 256], length, shape, overhead)
        assert len(notes) == 1
        assert str(entries) in notes[0]
        cost = (entries + second) * length * 16
        assert cost <= overhead * shape[0] * shape[1] or entries == second == 2


def test_half_precision_where_it_is_near() -> None:
    assert as_half(torch.tensor([1.0, 3e-5])).dtype == torch.float16
    assert as_half(torch.tensor([1e-7, 3e-7])).dtype == torch.float32
    assert as_half(torch.tensor([70000.0])).dtype == torch.float32
