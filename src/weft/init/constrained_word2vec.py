"""Learn from text in a new vocabulary which weighted means of old rows its new tokens should start as.

Constrained Word2Vec (CW2V) of Mundra et al., "An Empirical Comparison of Vocabulary Expansion and Initialization
Approaches for Language Models", arXiv:2407.05841 (2024).

    E' = softmax(A₁A₂) E        V' = softmax(C₁C₂) V
    loss = −log σ(⟨E_c, V_o⟩) − (w / K) Σ_{j ≤ K} log σ(−⟨E_c, V_{n_j}⟩)

E, V (old, width): frozen input and output rows. A₁, C₁ (new, k), A₂, C₂ (k, old): learned. c and o are tokens at most
``window`` apart in text that the new tokenizer made, n_j are drawn from counts^0.75. In the loss, E and V stand for old
and new rows together. Tied tables have one A. Rows of the softmax are nonnegative and sum to one.

Differences from the paper and its code: A₁ and C₁ start at zero and A₂, C₂ at N(0, 1/k), so that all start as the mean
of the old rows (uniform factors, as the authors' start, with k = 1024 are almost a single old row each); negatives are
drawn with replacement, so that no batch is too large for a vocabulary; only the rows that occur in a batch go through
the softmax, which leaves their gradient as it is; a pair's
negatives weigh w = 1 together and not K each, since w = K asks for products smaller by log K than those of the old rows,
which a mean of old rows cannot have: all new rows then run to the one old row that is the farthest from everything; pairs are drawn from the text for a number of steps, not listed and
passed over for epochs; frequent tokens are thinned out by frequency (``subsample``), not by counts, and by default not
at all. Dot products of E and V were never trained to be word2vec's; where they are small the loss is almost linear in
the coefficients, and many steps drive each row to a single old one: the number of steps regularises.
Complexity: each step (new rows in the batch) · old · (k + width) multiplications; 2k(new + old) learned numbers; the
result has new · old. Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError
from weft.function.protocol import wide

COPIED_FROM = 0  # source rows are numbered from here; below, a token is new
NEW = -1
NOISE_POWER = 0.75  # of counts, word2vec's
_CHUNK = 1024  # rows of the result that are computed together


def constrained_word2vec(
    table: Tensor,
    output: Tensor | None,
    source: Tensor,
    text: Iterable[Sequence[int]],
    *,
    rank: int = 64,
    window: int = 5,
    negatives: int = 5,
    negative_weight: float = 1.0,
    steps: int = 300,
    batch_size: int = 1024,
    learning_rate: float = 0.003,
    subsample: float = 0.0,
    generator: Generator | None = None,
) -> tuple[Tensor, ...]:
    """Convex coefficients of new tokens' rows over old rows, learned by skip-gram with negative sampling.

    Args:
        table: (old, width), the old input rows.
        output: (old, width), the old output rows; None where both tables are one.
        source: (ids), for each id of the new vocabulary its row in ``table``, −1 for a new token, −2 for no token.
        text: sequences of token ids of the new vocabulary.
        rank: k of the coefficients' logits.
        window: how far apart two tokens of a pair may be.
        negatives: K for each pair.
        negative_weight: w, of all negatives of a pair together; the paper's is K.
        steps: of Adam; with none, all coefficients are 1 / old.
        batch_size: pairs a step; those that leave their sequence are left out.
        learning_rate: of Adam.
        subsample: a token of frequency f stays in the text with probability √(subsample / f); 0 keeps all.
        generator: of torch, on the CPU; torch's global one if None.

    Returns:
        Coefficients (new, old) in order of the new tokens' ids, of the input table and, if it has one, of the output.

    Raises:
        RecipeError: the text has ids out of range or no pair of tokens, or the tables' shapes differ.

    Source: arXiv:2407.05841, section on constrained Word2Vec.

    >>> old = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    >>> source = torch.tensor([0, 1, 2, 3, 4, 5, -1])
    >>> (weights,) = constrained_word2vec(old, None, source, [[0, 6, 1, 6]], steps=3)
    >>> weights.shape, round(weights.sum().item(), 4)
    (torch.Size([1, 6]), 1.0)
    """
    if output is not None and output.shape != table.shape:
        raise RecipeError(
            f"Input rows are {list(table.shape)} and output rows {list(output.shape)}; their dot products are the method, "
            "so they must be of one shape. Use another strategy for this model."
        )
    device, dtype = table.device, wide(table)
    ids, sequence = _flat(text, source, subsample, generator)
    made = (source == NEW).nonzero().flatten()
    place = torch.full((len(source),), NEW)
    place[made] = torch.arange(len(made))
    place, source = place.to(device), source.to(device)
    frozen = [t.detach().to(dtype) for t in (table, output) if t is not None]
    right = [torch.randn(rank, len(table), generator=generator, dtype=dtype).div_(rank**0.5).to(device) for _ in frozen]
    left = [torch.zeros(len(made), rank, dtype=dtype, device=device) for _ in frozen]
    noise = torch.bincount(ids, minlength=len(source)).double().pow(NOISE_POWER)
    with torch.enable_grad():
        learned = [p.requires_grad_() for p in (*left, *right)]
        optimizer = torch.optim.Adam(learned, lr=learning_rate)
        for _ in range(steps if len(made) else 0):
            centre, context = _pairs(ids, sequence, window, batch_size, generator)
            if not len(centre):  # all pairs crossed the end of a sequence
                continue
            drawn = torch.multinomial(noise, len(centre) * negatives, replacement=True, generator=generator)
            others = torch.cat([context[:, None], drawn.view(-1, negatives)], dim=1)
            c = _rows(centre.to(device), source, place, frozen[0], left[0], right[0])
            o = _rows(others.flatten().to(device), source, place, frozen[-1], left[-1], right[-1])
            products = torch.einsum("bd,bjd->bj", c, o.view(*others.shape, -1))
            sign = torch.ones_like(products)
            sign[:, 0] = -1
            each = functional.softplus(sign * products)
            loss = (each[:, 0] + negative_weight * each[:, 1:].mean(dim=1)).mean()
            optimizer.zero_grad()
            if loss.requires_grad:  # a batch may hold no new token
                loss.backward()
                optimizer.step()
    with torch.no_grad():
        return tuple(
            torch.cat([(part @ a2).softmax(dim=1) for part in a1.split(_CHUNK)]) for a1, a2 in zip(left, right)
        )


def _flat(
    text: Iterable[Sequence[int]], source: Tensor, subsample: float, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """All sequences as one, and the number of the sequence that each token is of."""
    parts = [torch.as_tensor(s, dtype=torch.long).flatten() for s in text]
    ids = torch.cat([torch.empty(0, dtype=torch.long), *parts])
    sequence = torch.repeat_interleave(torch.tensor([len(p) for p in parts], dtype=torch.long))
    outside = (ids < 0) | (ids >= len(source))
    wrong = ids[outside | (source.cpu()[ids.masked_fill(outside, 0)] < NEW)]
    if len(wrong):
        raise RecipeError(
            f"The text has {len(wrong)} ids without a token in the new vocabulary of {len(source)} rows (the first is "
            f"{wrong[0]}); it must be tokenised with the new tokenizer."
        )
    if subsample and len(ids):
        share = torch.bincount(ids).div(len(ids))
        kept = torch.rand(len(ids), generator=generator) < (subsample / share[ids]).sqrt()
        ids, sequence = ids[kept], sequence[kept]
    if not bool((sequence[1:] == sequence[:-1]).any()):
        raise RecipeError(
            f"The text has {len(parts)} sequences and {len(ids)} tokens, and no two in one sequence; there is nothing to "
            "learn from. Give sequences of token ids, not single ids."
        )
    return ids, sequence


def _pairs(
    ids: Tensor, sequence: Tensor, window: int, count: int, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """Tokens at random places, and one at most ``window`` before or behind each; pairs across sequences are left out."""
    first = torch.randint(len(ids), (count,), generator=generator)
    apart = torch.randint(1, window + 1, (count,), generator=generator)
    second = first + torch.where(torch.rand(count, generator=generator) < 0.5, apart, -apart)
    inside = (second >= 0) & (second < len(ids))
    inside &= sequence[second.clamp(0, len(ids) - 1)] == sequence[first]
    return ids[first[inside]], ids[second[inside]]


def _rows(
    tokens: Tensor, source: Tensor, place: Tensor, old: Tensor, left: nn.Parameter | Tensor, right: Tensor
) -> Tensor:
    """(n) -> (n, width): rows of the new vocabulary, those of new tokens through the softmax, once each."""
    rows = old[source[tokens].clamp(min=COPIED_FROM)]
    new = (place[tokens] != NEW).nonzero().flatten()
    if not len(new):
        return rows
    distinct, inverse = place[tokens[new]].unique(return_inverse=True)
    made = (left[distinct] @ right).softmax(dim=1) @ old
    return rows.index_put((new,), made[inverse])
