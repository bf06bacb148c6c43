"""Principal components of a stream of rows, in the memory of one block of them.

Levey & Lindenbaum, IEEE TIP 9 (2000); with a moving mean, Ross et al., IJCV 77 (2008).

    seen:  n rows with mean μ, S (k) and V (k, features)              new:  X (m, features) with mean μ'
    [diag(S) V; X − μ'; √(n m / (n + m)) (μ − μ')] = U S⁺ V⁺          keep the first k of S⁺ and V⁺
    ratio_j = S_j² / Σ_d Σ_rows (x_d − μ_d)²                          without centring, μ = 0 throughout

Exact while no more than k directions have been seen, or k = features; otherwise each block loses what lies outside of
k directions. It belongs to no family: what measures activations, what starts from them and what prunes by them read
the same components, so it stands in the engine beside the other passes over data.

Differences from scikit-learn's IncrementalPCA, whose numbers these are: blocks may have fewer rows than k, centring
can be left out, and a component's sign is left as the decomposition gives it.
Complexity: a decomposition of (k + m + 1, features) a block, in float64. Re-implemented from the equations
(scikit-learn: BSD-3-Clause).
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import RecipeError


class IncrementalPCA:
    """The first principal components of all rows given to :meth:`update`.

    Args:
        components: k, how many to keep; as many as there are features at most.
        center: whether components are those of the rows without their mean.

    Attributes:
        count: rows seen.
        mean: of the rows (features); zeros without centring. None before the first block, as are all that follow.
        squares: sums of squared distances from the mean (features).
        components: orthonormal rows (at most k, features), the largest first, float64.
        singular_values: of the rows along the components.

    Source: the equations above.

    >>> pca = IncrementalPCA(1)
    >>> pca.update(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    >>> pca.update(torch.tensor([[4.0, 0.0]]))
    >>> pca.mean.tolist(), pca.components.abs().tolist(), pca.ratios.round(decimals=6).tolist()
    ([2.0, 0.0], [[1.0, 0.0]], [1.0])
    """

    def __init__(self, components: int, *, center: bool = True):
        if components < 1:
            raise RecipeError(f"A principal component analysis keeps at least 1 component, got {components}.")
        self.wanted = components
        self.center = center
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None
        self.components: Tensor | None = None
        self.singular_values: Tensor | None = None

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Take (m, features) into account; no rows change nothing.

        Raises:
            RecipeError: the shape is another than before, or a number is NaN or infinite.
        """
        features = rows.shape[-1] if self.mean is None else len(self.mean)
        if rows.dim() != 2 or rows.shape[1] != features or not features:
            raise RecipeError(f"Rows must be (rows, {features or 'features'}), got {list(rows.shape)}.")
        if not len(rows):
            return
        if not bool(rows.isfinite().all()):
            raise RecipeError("Rows hold NaN or infinity, of which there are no principal components.")
        rows, number = rows.double(), len(rows)
        mean = rows.mean(0) if self.center else torch.zeros_like(rows[0])
        rows = rows - mean
        squares = rows.square().sum(0)
        if self.mean is None or self.squares is None or self.components is None or self.singular_values is None:
            self.mean, self.squares, stacked = mean, squares, rows
        else:
            shift = (self.count * number / (self.count + number)) ** 0.5 * (self.mean - mean)
            stacked = torch.cat([self.singular_values.unsqueeze(1) * self.components, rows, shift.unsqueeze(0)])
            self.squares = self.squares + squares + shift.square()
            self.mean = self.mean + (mean - self.mean) * (number / (self.count + number))
        self.count += number
        self.singular_values, self.components = _largest(stacked, self.wanted)

    @property
    def variance(self) -> Tensor:
        """Of each feature, over all rows (divided by their number), around the mean."""
        return self._known(self.squares) / self.count

    @property
    def ratios(self) -> Tensor:
        """The share of all variance that each component explains; zeros where nothing varies.

        Without centring, the share of the sum of squares.
        """
        values, total = self._known(self.singular_values), self._known(self.squares).sum()
        return torch.where(total > 0, values.square() / total, 0.0)

    def _known(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise RecipeError("No rows have been seen yet; call update first.")
        return value


def _largest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values of (n, features) and their right vectors, (k), (k, features).

    By the eigenvectors of the smaller Gram matrix, ten times as fast as a singular value decomposition and as exact
    (1e-8) while the values wanted are above a ten-thousandth of the largest; else by the latter.
    """
    wide = len(rows) <= rows.shape[1]
    squares, vectors = torch.linalg.eigh(rows @ rows.mT if wide else rows.mT @ rows)
    values = squares.flip(0)[:count].clamp_min(0).sqrt()
    if bool(values[-1] > 1e-4 * values[0]):
        vectors = vectors.flip(1)[:, :count].mT
        return values, vectors @ rows / values.unsqueeze(1) if wide else vectors
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return values[:count], directions[:count]


def overlap(first: Tensor, second: Tensor) -> float:
    """How much two subspaces share: the mean squared cosine of their principal angles, 1 if they are equal.

    Args:
        first, second: orthonormal rows (k, features).

    Returns:
        ‖first secondᵀ‖² / k, in [0, 1]; 1 for no rows.

    Raises:
        RecipeError: their shapes differ.

    >>> overlap(torch.eye(3)[:2], torch.eye(3)[1:])
    0.5
    """
    if first.shape != second.shape:
        raise RecipeError(f"Subspaces of {list(first.shape)} and {list(second.shape)} have no overlap of one number.")
    return float((first @ second.mT).square().sum() / len(first)) if len(first) else 1.0
