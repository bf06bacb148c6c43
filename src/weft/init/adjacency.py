"""The matrix that a graph convolution multiplies features by, from a graph's adjacency."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import RecipeError


def normalized_adjacency(adjacency: Tensor, self_loops: bool = True) -> Tensor:
    """D^{−1/2} (A + I) D^{−1/2}, the matrix of a graph convolution (GCN).

    Rows are divided by the root of their sums, columns by that of theirs; for a symmetric graph both are the degrees.

    Args:
        adjacency: (n, n), dense or sparse, weights of at least 0; row i receives from column j.
        self_loops: add I; pass False where A has its self-loops already.

    Returns:
        (n, n), sparse (COO), in float64 where A is and in float32 otherwise.

    Raises:
        RecipeError: not square, a negative or non-finite weight.

    >>> normalized_adjacency(torch.tensor([[0, 1], [1, 0]])).to_dense()
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    matrix = sparse_matrix(adjacency)
    n = len(matrix)
    if bool((matrix.values() < 0).any()):
        raise RecipeError("Edge weights must be at least 0 for D^{-1/2} to exist; normalise signed graphs yourself.")
    if self_loops:
        diagonal = torch.arange(n, device=matrix.device)
        ones = torch.ones(n, dtype=matrix.dtype, device=matrix.device)
        matrix = (
            matrix + torch.sparse_coo_tensor(torch.stack([diagonal, diagonal]), ones, (n, n), check_invariants=True)
        ).coalesce()
    values, (row, column) = matrix.values(), matrix.indices()
    zeros = torch.zeros(n, dtype=values.dtype, device=values.device)
    into, out = zeros.index_add(0, row, values), zeros.index_add(0, column, values)
    scaled = values / torch.where(values > 0, into[row] * out[column], 1).sqrt()
    dtype = torch.float64 if adjacency.dtype == torch.float64 else torch.float32
    return torch.sparse_coo_tensor(matrix.indices(), scaled.to(dtype), (n, n), is_coalesced=True, check_invariants=True)


def sparse_matrix(adjacency: Tensor) -> Tensor:
    """(n, n), of any layout -> sparse (COO), coalesced, in float64.

    Raises:
        RecipeError: not square, no nodes, NaN or infinity.

    >>> sparse_matrix(torch.eye(3)).values()
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    if adjacency.dim() != 2 or adjacency.shape[0] != adjacency.shape[1] or not len(adjacency):
        raise RecipeError(
            f"adjacency must be square, (nodes, nodes), got {list(adjacency.shape)}. For a list of edges (2, edges), "
            "make torch.sparse_coo_tensor(edges.flip(0), torch.ones(edges.shape[1]), (nodes, nodes))."
        )
    matrix = adjacency.detach().double().to_sparse_coo().coalesce()
    if not bool(matrix.values().isfinite().all()):
        raise RecipeError("adjacency holds NaN or infinity.")
    return matrix
