"""Incremental principal components against scikit-learn and a decomposition of all rows at once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.engine.incremental_pca import IncrementalPCA, overlap
from weft.errors import RecipeError


def rows(count: int = 300, features: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return x * torch.linspace(3, 0.1, features) @ torch.linalg.qr(torch.randn(features, features, generator=generator,
                                                                              dtype=torch.float64))[0] + 5  # fmt: skip


def fed(x: Tensor, sizes: list[int], components: int, *, center: bool = True) -> IncrementalPCA:
    pca = IncrementalPCA(components, center=center)
    for block in x.split(sizes):
        pca.update(block)
    return pca


def test_as_scikit_learns() -> None:
    from sklearn.decomposition import IncrementalPCA as Theirs

    x = rows()
    theirs = Theirs(4)
    for block in x.split(50):
        theirs.partial_fit(block.numpy())
    ours = fed(x, [50] * 6, 4)
    assert ours.count == theirs.n_samples_seen_
    for mine, other in (
        (ours.mean, theirs.mean_),
        (ours.variance, theirs.var_),
        (ours.singular_values, theirs.singular_values_),
        (ours.ratios, theirs.explained_variance_ratio_),
        (ours.components.abs(), np.abs(theirs.components_)),
    ):
        np.testing.assert_allclose(mine.numpy(), other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("sizes", [[300], [100, 200], [1, 2, 3, 294], [60] * 5])
def test_with_all_components_it_is_the_decomposition_of_all_rows(center: bool, sizes: list[int]) -> None:
    x = rows()
    pca = fed(x, sizes, 12, center=center)
    moved = x - x.mean(0) if center else x
    _, values, directions = torch.linalg.svd(moved, full_matrices=False)
    torch.testing.assert_close(pca.singular_values, values)
    torch.testing.assert_close(pca.ratios.sum(), torch.tensor(1.0, dtype=torch.float64))
    for k in range(1, 13):
        assert overlap(pca.components[:k], directions[:k]) == pytest.approx(1, abs=1e-9)


def test_data_of_few_directions_need_no_more_components() -> None:
    x = torch.randn(90, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    pca, exact = fed(x, [30] * 3, 4), torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(pca.singular_values[:3], exact.S[:3])
    assert overlap(pca.components[:3], exact.Vh[:3]) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(pca.components @ pca.components.mT, torch.eye(4, dtype=torch.float64))


def test_bfloat16_rows_far_from_zero_keep_their_variance() -> None:
    x = (rows() * 0.01 + 100).bfloat16()
    pca = fed(x, [50] * 6, 4)
    torch.testing.assert_close(pca.variance, x.double().var(0, correction=0))


def test_rows_that_never_vary_explain_nothing() -> None:
    pca = fed(torch.ones(9, 3), [4, 5], 2)
    assert pca.ratios.tolist() == [0, 0]
    torch.testing.assert_close(pca.components @ pca.components.mT, torch.eye(2, dtype=torch.float64))


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        IncrementalPCA(0)
    pca = IncrementalPCA(2)
    with pytest.raises(RecipeError, match="No rows"):
        _ = pca.ratios
    for bad in (torch.ones(3), torch.ones(2, 2, 2), torch.ones(2, 0)):
        with pytest.raises(RecipeError, match="Rows must be"):
            pca.update(bad)
    pca.update(torch.ones(0, 3))
    assert pca.count == 0
    pca.update(torch.ones(2, 3))
    with pytest.raises(RecipeError, match=r"\(rows, 3\)"):
        pca.update(torch.ones(2, 4))
    for value in (torch.nan, torch.inf):
        with pytest.raises(RecipeError, match="NaN"):
            pca.update(torch.full((2, 3), value))
    with pytest.raises(RecipeError, match="overlap"):
        overlap(torch.eye(3)[:2], torch.eye(3))
