"""Codebooks of vectors: weighted k-means, and the nearest entries of a table in little memory.

    minimise over centroids c and assignments a:   Σᵢ wᵢ ‖uᵢ − c_{a(i)}‖²        u (n, d), c (k, d), w (n,) ≥ 0

Starts are drawn as in k-means++ (Arthur and Vassilvitskii 2007): each with a chance that grows with wᵢ times the squared
distance to the nearest before it (of a few draws the best), so that as many starts as there are different vectors hold them
all. Lloyd's steps follow; where there are more than ``batch`` vectors each step sees a random part of them, and an entry is
the mean of all that it was given (Sculley 2010). An entry that is nearest to none becomes the vector that fares worst.
Complexity: O(n · k · d) for a step; distances are held for 2¹⁸ pairs at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PAIRS = 1 << 18  # distances at a time: 1 MB of float32, which a core's cache holds
STEP = 1 << 23  # distances of one step, of 8192 vectors at least
DRAWS = 1 << 26  # numbers times entries up to which several draws are compared
SEEDS = 32  # vectors, for each entry, among which starts are drawn


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """The nearest entry of each vector: (n, d), (k, d) -> (n,) int64.

    >>> nearest(torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[2.0, 1.0], [0.0, 0.0]])).tolist()
    [1, 0]
    """
    if table.shape[1] == 1:
        values, order = table[:, 0].sort(stable=True)
        return order[torch.bucketize(vectors[:, 0].contiguous(), (values[:-1] + values[1:]) / 2)]
    half = table.square().sum(1) / 2
    if vectors.device.type == "cpu":
        from weft.kernels.nearest import nearest_entries

        found = torch.empty(len(vectors), dtype=torch.int64)
        columns, entries = vectors.T.contiguous(), table.to(vectors.dtype).contiguous()
        nearest_entries(columns.numpy(), entries.numpy(), half.to(vectors.dtype).numpy(), found.numpy())
        return found
    across = table.T.contiguous()
    size = max(1, PAIRS // len(table))
    # ½ ‖u − c‖² without ½ ‖u‖², which is the same for all c
    return torch.cat([torch.addmm(half, part, across, alpha=-1).argmin(1) for part in vectors.split(size)])


def weighted_kmeans(
    vectors: Tensor,
    entries: int,
    weights: Tensor | None = None,
    *,
    generator: torch.Generator,
    iterations: int = 100,
    tolerance: float = 1e-5,
    batch: int = 0,
) -> Tensor:
    """A codebook: (n, d) -> (k, d).

    Args:
        vectors: (n, d) float32 or float64.
        entries: k; entries beyond the number of different vectors repeat others.
        weights: (n,), none negative; all alike if None or all zero.
        generator: on the CPU.
        iterations: of Lloyd, at most.
        tolerance: a step that moves the entries by a smaller share of the vectors' spread (both squared) is the last.
        batch: vectors of a step; 0 for as many as keep a step below 2²³ distances.

    >>> points = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    >>> found = weighted_kmeans(points, 2, torch.tensor([3.0, 1.0, 1.0, 1.0]), generator=torch.Generator().manual_seed(0))
    >>> sorted(found.flatten().tolist())
    [0.25, 11.0]
    """
    if weights is None or not bool((weights > 0).any()):
        weights = torch.ones(len(vectors), device=vectors.device)
    weights = weights.double()
    # a weighted spread of zero (all vectors alike) makes no step a small one: there is none
    centre = (vectors.double() * weights[:, None]).sum(0) / weights.sum()
    spread = float(((vectors.double() - centre).square().sum(1) * weights).sum() / weights.sum())
    table = _starts(vectors, entries, weights, generator)
    batch = batch or max(8192, STEP // entries)
    whole = len(vectors) <= batch
    held = torch.zeros(entries, dtype=torch.float64, device=vectors.device)  # weight that each entry is the mean of
    for _ in range(iterations):
        part, share = vectors, weights
        if not whole:
            chosen = torch.randint(len(vectors), (batch,), generator=generator).to(vectors.device)
            part, share = vectors[chosen], weights[chosen]
        found = nearest(part, table)
        new = torch.bincount(found, weights=share, minlength=entries)
        sums = [torch.bincount(found, weights=share * column, minlength=entries) for column in part.double().unbind(1)]
        before = held if not whole else torch.zeros_like(held)
        held = before + new
        moved = (table.double() * before[:, None] + torch.stack(sums, 1)) / held.clamp(min=1e-300)[:, None]
        moved = torch.where(held[:, None] > 0, moved, table.double())
        empty = (held == 0).nonzero().flatten()
        if len(empty):
            errors = (part.double() - moved[found]).square().sum(1) * share
            worst = errors.topk(min(len(empty), len(errors)))
            worst_index = worst.indices[worst.values > 0]
            moved[empty[: len(worst_index)]] = part[worst_index].double()
            refilled = len(worst_index) > 0
        else:
            refilled = False
        step = float((moved - table.double()).square().sum(1).mean())
        table = moved.to(vectors.dtype)
        if whole and not refilled and step <= tolerance * spread:
            break
    return table


def _starts(vectors: Tensor, entries: int, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Entries of k-means++ (k, d)."""
    most = max(4096, SEEDS * entries)
    if len(vectors) > most:
        chosen = torch.randperm(len(vectors), generator=generator)[:most].to(vectors.device)
        vectors, weights = vectors[chosen], weights[chosen]
        if not bool((weights > 0).any()):
            weights = torch.ones_like(weights)
    # of some draws the best, as scikit-learn does, where that is cheap
    trials = 2 + int(math.log(entries)) if vectors.numel() * entries <= DRAWS else 1
    draws = torch.rand(entries, trials, generator=generator, dtype=torch.float64).to(vectors.device)
    columns = vectors.T.contiguous()  # (d, n): differences of one dimension are one piece of memory
    chances, made = weights, []
    distances = torch.full_like(vectors[:, 0], torch.inf)
    for draw in draws:
        sums = chances.cumsum(0)
        if not bool(sums[-1] > 0):  # every vector is an entry
            break
        # right: an index whose own chance is zero is never drawn
        drawn = torch.searchsorted(sums, draw * sums[-1], right=True).clamp(max=len(sums) - 1)
        tried = (columns.unsqueeze(1) - columns[:, drawn].unsqueeze(2)).square().sum(0)  # (trials, n)
        tried = torch.minimum(distances, tried)
        best = 0 if trials == 1 else int((tried.double() @ weights).argmin())
        made.append(vectors[drawn[best]])
        distances = tried[best]
        chances = distances * weights
    return torch.stack([*made, *made[:1] * (entries - len(made))])


def affordable(
    asked: list[int], length: int, shape: tuple[int, ...], overhead: float
) -> tuple[list[int], tuple[str, ...]]:
    """Entries of codebooks, halved from the largest down until they take few enough bits of a layer.

    Args:
        asked: entries of each codebook.
        length: numbers of an entry, of which each takes 16 bits.
        shape: (out, in).
        overhead: bits a weight that codebooks may take.

    Returns:
        The entries, at least 2 of each, and a note if they are fewer than asked for.

    >>> affordable([256], 4, (64, 64), 0.25)
    ([16], ('codebooks of 16 entries instead of 256, which would take more than 0.25 bits a weight',))
    """
    sizes = list(asked)
    while sum(sizes) * length * 16 > overhead * shape[0] * shape[1] and max(sizes) > 2:
        sizes[sizes.index(max(sizes))] = max(2, max(sizes) // 2)
    if sizes == asked:
        return sizes, ()
    given, wanted = (" and ".join(map(str, each)) for each in (sizes, asked))
    return sizes, (
        f"codebooks of {given} entries instead of {wanted}, which would take more than {overhead:g} bits a weight",
    )


def as_half(table: Tensor) -> Tensor:
    """A table in half precision, if that changes no value by more than 0.1 % of the largest; else in float32.

    >>> as_half(torch.tensor([0.5])).dtype, as_half(torch.tensor([1e30])).dtype
    (torch.float16, torch.float32)
    """
    half = table.to(torch.float16)
    near = (half.double() - table.double()).abs() <= 1e-3 * table.abs().max()
    return half if bool(near.all()) else table.float()
