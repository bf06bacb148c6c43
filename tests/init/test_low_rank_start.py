import numpy as np
import pytest
import torch
from torch import Tensor

from weft.errors import RecipeError
from weft.init import low_rank_


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def size(matrix: Tensor, match: str) -> float:
    array = matrix.numpy()
    if match == "radius":
        return float(np.abs(np.linalg.eigvals(array)).max())
    return float(np.linalg.norm(array, "fro" if match == "frobenius" else 2))


@pytest.mark.parametrize("match", ["frobenius", "spectral", "radius"])
@pytest.mark.parametrize("rank", [1, 3, 10])
def test_rank_falls_and_size_stays(match: str, rank: int) -> None:
    before = drawn(12, 12)
    after = low_rank_(before.clone(), rank, match)
    assert np.linalg.matrix_rank(after.numpy(), tol=1e-9) == rank
    assert size(after, match) == pytest.approx(size(before, match), rel=1e-9)
    u, sigma, vt = np.linalg.svd(before.numpy())
    best = u[:, :rank] @ np.diag(sigma[:rank]) @ vt[:rank]
    direction = after.numpy() / np.linalg.norm(after.numpy())
    np.testing.assert_allclose(direction, best / np.linalg.norm(best), atol=1e-12)  # the nearest of that rank, scaled


def test_rank_one_at_one_frobenius_norm_has_it_all_in_one_direction() -> None:
    weight = drawn(100, 100)
    norm = size(weight, "frobenius")
    low_rank_(weight, 1)
    assert size(weight, "spectral") == pytest.approx(norm, rel=1e-9)


def test_full_rank_changes_nothing() -> None:
    weight = drawn(6, 4)
    for rank in (4, 100):
        assert torch.equal(low_rank_(weight.clone(), rank), weight)


def test_kernels_are_matrices_of_out_by_the_rest() -> None:
    kernel = drawn(8, 3, 3, 3)
    assert torch.linalg.matrix_rank(low_rank_(kernel, 2).flatten(1)) == 2


def test_strides_are_kept() -> None:
    plain = drawn(5, 7)
    turned = plain.t().contiguous().t()
    torch.testing.assert_close(low_rank_(turned, 2), low_rank_(plain.clone(), 2))
    assert turned.stride() == (1, 5)


@pytest.mark.parametrize("match", ["frobenius", "spectral", "radius"])
def test_zeros_stay_zeros(match: str) -> None:
    assert not low_rank_(torch.zeros(4, 4), 2, match).any()
    assert low_rank_(torch.zeros(0, 0), 2, match).shape == (0, 0)


def test_refuses() -> None:
    with pytest.raises(RecipeError, match="no rank to lower"):
        low_rank_(torch.ones(4))
    with pytest.raises(RecipeError, match="Only square"):
        low_rank_(torch.ones(4, 5), 2, "radius")
    with pytest.raises(RecipeError, match="NaN"):
        low_rank_(torch.full((4, 4), torch.nan), 2)
    with pytest.raises(RecipeError, match="between 1"):
        low_rank_(torch.ones(4, 4), 0)
    with pytest.raises(RecipeError, match="Did you mean frobenius"):
        low_rank_(torch.ones(4, 4), 1, "frobenis")
    # largest singular value in a block without eigenvalues: (0, 2; 0, 0)
    with pytest.raises(RecipeError, match="spectral radius of 0"):
        low_rank_(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), 1, "radius")
