"""The rows of a new vocabulary: coefficients over old rows, or draws from their law."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from weft.errors import RecipeError
from weft.init._tables import Tables
from weft.init.constrained_word2vec import NEW, constrained_word2vec
from weft.method import parameter

STRATEGIES = ("mean", "univariate", "multivariate", "subword_mean", "convex", "cw2v")
LEARNED = ("rank", "window", "negatives", "negative_weight", "steps", "batch_size", "learning_rate", "subsample")
SCALES = {"univariate": 1.0, "multivariate": 1e-5}  # the authors'
NO_TOKEN = -2
JITTER = 1e-8  # of the mean variance, far below what float32 rows resolve
SUM_TOLERANCE = 1e-2  # of given coefficients; a row of bfloat16 numbers is off by up to 4e-3
Pieces = Sequence[Sequence[int]] | Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Vocabulary:
    """Configuration of :func:`extend_vocabulary_` and :func:`replace_vocabulary_`."""

    strategy: str = parameter("subword_mean", "where new rows start", choices=STRATEGIES)
    scale: float | None = parameter(None, "c of the Gaussian strategies; 1 and 1e-5 if none is given", minimum=0)
    pad_to_multiple_of: int = parameter(1, "rows of the tables are a multiple of this", minimum=1)
    rank: int = parameter(64, "cw2v: rank of the coefficients' logits", minimum=1)
    window: int = parameter(5, "cw2v: how far apart two tokens of a pair may be", minimum=1)
    negatives: int = parameter(5, "cw2v: random tokens beside each pair", minimum=1)
    negative_weight: float = parameter(1.0, "cw2v: weight of a pair's random tokens together", minimum=0)
    steps: int = parameter(300, "cw2v: steps of Adam", minimum=0)
    batch_size: int = parameter(1024, "cw2v: pairs a step", minimum=1)
    learning_rate: float = parameter(0.003, "cw2v: learning rate of Adam", minimum=0)
    subsample: float = parameter(0.0, "cw2v: frequency above which tokens are thinned out, 0 for none", minimum=0)


@dataclass(frozen=True)
class Expansion:
    """What was done to the tables.

    Attributes:
        copied: (copied, 2), new and old row of each token that was kept.
        made: (made), rows of new tokens.
        padding: rows that no token has.
        input: (made, old rows) coefficients of the input rows over the old ones, dense or sparse; None if drawn.
        output: those of the output rows; the same object if the tables are tied, None without an output table.
        unset: names of the configuration's token ids whose token is gone, for you to set.
    """

    copied: Tensor
    made: Tensor
    padding: Tensor
    input: Tensor | None
    output: Tensor | None
    unset: tuple[str, ...] = ()


@torch.no_grad()
def fill(
    tables: Tables,
    source: Tensor,
    used: Tensor,
    names: list[str] | None,
    pieces: Pieces | None,
    coefficients: Tensor | tuple[Tensor, Tensor] | None,
    text: Iterable[Sequence[int]] | None,
    config: Vocabulary,
    generator: Generator | None,
) -> Expansion:
    """Make all rows and write them.

    Args:
        tables: of the model.
        source: (rows to be), for each its old row, NEW or NO_TOKEN.
        used: old rows that tokens have.
        names: texts of the new tokens, if known.
        pieces, coefficients, text, config, generator: as the public functions take them.
    """
    strategy, rows, count = config.strategy, tables.rows, len(tables.values)
    made, kept = (source == NEW).nonzero().flatten(), (source >= 0).nonzero().flatten()
    needed = {"subword_mean": ("pieces", pieces), "convex": ("coefficients", coefficients), "cw2v": ("text", text)}
    name, value = needed.get(strategy, ("", ()))
    if value is None:
        raise RecipeError(f'strategy="{strategy}" needs {name}=...; strategy="mean" needs nothing.')
    mixes: tuple[Tensor | None, ...] = (None,) * count
    if strategy == "mean":
        mixes = tuple(evenly(used, rows).to(v).expand(len(made), -1) for v in tables.values)  # one row in memory
    elif strategy == "subword_mean" and pieces is not None:
        mixes = (piece_mix(pieces, names, len(made), used, rows),) * count
    elif strategy == "convex" and coefficients is not None:
        mixes = given_mix(coefficients, len(made), rows, count)
    elif strategy == "cw2v" and text is not None:
        place = torch.full((rows,), NO_TOKEN)
        place[used] = torch.arange(len(used))  # rows without a token are in no mean
        weights = [v[used.to(v.device), : tables.width(i)] for i, v in enumerate(tables.values)]
        known = torch.where(source >= 0, place[source.clamp(min=0)], source)
        options = {key: getattr(config, key) for key in LEARNED}
        output = weights[1] if count > 1 else None
        learned = constrained_word2vec(weights[0], output, known, text, **options, generator=generator)
        mixes = tuple(m.new_zeros(len(made), rows).index_copy_(1, used.to(m.device), m) for m in learned)
    new = []
    mixes = tuple(mix if mix is None else mix.to(old) for mix, old in zip(mixes, tables.values))
    for old, mix in zip(tables.values, mixes):
        tokens = old[used.to(old.device)]
        value = tokens.mean(dim=0).repeat(len(source), 1)
        value[kept.to(old.device)] = old[source[kept].to(old.device)]
        if mix is None:
            scale = SCALES[strategy] if config.scale is None else config.scale
            value[made.to(old.device)] = drawn(tokens, len(made), scale, strategy == "multivariate", generator)
        elif strategy != "mean":
            value[made.to(old.device)] = mix @ old
        new.append(value)
    tables.write(new)
    return Expansion(
        copied=torch.stack([kept, source[kept]], dim=1),
        made=made,
        padding=(source == NO_TOKEN).nonzero().flatten(),
        input=mixes[0],
        output=mixes[-1] if tables.head is not None else None,
    )


def multiple(count: int, of: int) -> int:
    """The smallest multiple of ``of`` that is no less.

    >>> multiple(9, 8)
    16
    """
    return -(-count // of) * of


def evenly(used: Tensor, rows: int) -> Tensor:
    """(rows): the same coefficient for each used row.

    >>> evenly(torch.tensor([0, 2]), 3)
    tensor([0.5000, 0.0000, 0.5000], dtype=torch.float64)
    """
    return torch.zeros(rows, dtype=torch.float64).index_fill_(0, used, 1 / len(used))


def piece_mix(pieces: Pieces, names: list[str] | None, count: int, used: Tensor, rows: int) -> Tensor:
    """(count, rows), sparse: the mean of each token's pieces, of all used rows for a token without pieces.

    >>> piece_mix([[0, 2], [1]], None, 2, torch.arange(3), 3).to_dense().tolist()
    [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    """
    if callable(pieces):
        if names is None:
            raise RecipeError("pieces as a function needs the texts of the new tokens; give them as a list.")
        pieces = [pieces(name) for name in names]
    if len(pieces) != count:
        raise RecipeError(f"pieces has {len(pieces)} entries for {count} new tokens; give the old ids of each.")
    known = torch.zeros(rows, dtype=torch.bool).index_fill_(0, used, True)
    where: list[int] = []
    what: list[int] = []
    share: list[float] = []
    for number, given in enumerate(pieces):
        ids = list(given)
        wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < rows or not known[i]]
        if wrong:
            label = f" ({names[number]!r})" if names else ""
            raise RecipeError(
                f"Piece {wrong[0]!r} of new token {number}{label} is no id of the old tokenizer, which has {len(used)} "
                f"tokens in {rows} rows; tokenise new tokens with the old tokenizer, without special tokens."
            )
        ids = ids or used.tolist()
        where += [number] * len(ids)
        what += ids
        share += [1 / len(ids)] * len(ids)
    values = torch.tensor(share, dtype=torch.float64)
    index = torch.tensor([where, what], dtype=torch.long)
    return torch.sparse_coo_tensor(index, values, (count, rows), check_invariants=True).coalesce()


def given_mix(coefficients: Tensor | tuple[Tensor, ...], count: int, rows: int, tables: int) -> tuple[Tensor, ...]:
    """Given coefficients for each table, if they are convex.

    >>> len(given_mix(torch.tensor([[0.5, 0.5]]), 1, 2, 2))
    2
    """
    each = coefficients if isinstance(coefficients, tuple) else (coefficients,) * tables
    if len(each) != tables:
        raise RecipeError(f"{len(each)} matrices of coefficients for {tables} tables (tied tables are one).")
    for mix in each:
        if tuple(mix.shape) != (count, rows):
            raise RecipeError(f"Coefficients are (new tokens, old rows), {[count, rows]} here, got {list(mix.shape)}.")
        values = mix.coalesce().values() if mix.is_sparse else mix
        sums = mix.double().sum(dim=1)
        sums = sums.to_dense() if sums.is_sparse else sums
        off = (sums - 1).abs().le(SUM_TOLERANCE).logical_not().nonzero().flatten().tolist()  # NaN is off, too
        if off or bool((values < 0).any()):
            raise RecipeError(
                f"Coefficients must be nonnegative and sum to 1 in each row; {len(off)} rows do not sum to 1 "
                f"{off[:3]}, the smallest coefficient is {values.min().item():g}. Divide each row by its sum."
            )
    return each


def drawn(old: Tensor, count: int, scale: float, joint: bool, generator: Generator | None) -> Tensor:
    """(count, columns): draws from the Gaussian of the old rows, its covariance times ``scale``.

    Args:
        old: (tokens, columns).
        count: how many.
        scale: c.
        joint: with the full covariance, or column by column.
        generator: of torch, on the CPU.

    >>> rows = drawn(torch.ones(5, 2), 1, 1.0, True, None)
    >>> torch.allclose(rows, torch.ones(1, 2))
    True
    """
    mean = old.mean(dim=0)
    noise = torch.randn(count, old.shape[1], generator=generator, dtype=old.dtype).to(old.device)
    if not joint:
        return mean + noise * (scale * old.var(dim=0, correction=0)).sqrt()
    centred = (old - mean).double()
    covariance = centred.mT @ centred / len(old)
    jitter = JITTER * covariance.diagonal().mean() + torch.finfo(torch.float64).tiny
    covariance.diagonal().add_(jitter)
    factor = torch.linalg.cholesky(covariance) * scale**0.5
    return mean + noise @ factor.to(old.dtype).mT
