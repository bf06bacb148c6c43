"""Give a language model new tokens, or another tokenizer, whose rows start from old ones so that nothing breaks.

Mundra et al., "An Empirical Comparison of Vocabulary Expansion and Initialization Approaches for Language Models",
arXiv:2407.05841 (2024).

    e_new = Σᵢ aᵢ eᵢ,  aᵢ ≥ 0,  Σᵢ aᵢ = 1        eᵢ: rows of old tokens in the output table
    ⇒ for every hidden state h:  ⟨h, e_new⟩ ≤ maxᵢ ⟨h, eᵢ⟩, so no new token wins greedy decoding over all old ones

=============  ==================================================================  ==============================
strategy       a new row is                                                        convex
=============  ==================================================================  ==============================
mean           μ, the mean of old rows                                             yes
subword_mean   the mean of the rows of the token's pieces in the old tokenizer     yes
convex         by given coefficients                                               yes
cw2v           by learned ones (:mod:`weft.init.constrained_word2vec`)             yes
univariate     N(μⱼ, c σⱼ²) in each column, c = 1                                  no
multivariate   N(μ, c Σ), c = 1e-5, by the Cholesky factor of cΣ + εI              no; μ and a whisper
=============  ==================================================================  ==============================

Tokens of both vocabularies keep their rows bit for bit. Tied tables are one matrix; an output table of its own gets
coefficients or draws of its own. A head's bias is one more column, so the theorem holds with it. All is computed in
float32 (float64 for such tables) and cast once; in half precision the theorem holds up to that rounding. Rows without a
token, such as those up to ``pad_to_multiple_of``, hold μ.

Differences from the paper and its code: ε is 1e-8 of the mean variance, so singular Σ is no obstacle; Σ divides by the
number of rows; the bias is treated as a column, and not set apart.
Complexity: mean, subword_mean O(new · width); multivariate width³ + (old + new) · width²; convex O(nonzeros · width).
Re-implemented from the equations (official code: no licence).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from weft.errors import RecipeError
from weft.function.initializer import InitMethod
from weft.init._expansion import NO_TOKEN, Expansion, Pieces, Vocabulary, fill, multiple
from weft.init._tables import Tables
from weft.init.constrained_word2vec import NEW
from weft.method import configure


def extend_vocabulary_(
    model: nn.Module,
    new: int | Sequence[str],
    *,
    head: nn.Module | None = None,
    pieces: Pieces | None = None,
    coefficients: Tensor | tuple[Tensor, Tensor] | None = None,
    text: Iterable[Sequence[int]] | None = None,
    tokens: int | None = None,
    strategy: str = "subword_mean",
    scale: float | None = None,
    pad_to_multiple_of: int = 1,
    rank: int = 64,
    window: int = 5,
    negatives: int = 5,
    negative_weight: float = 1.0,
    steps: int = 300,
    batch_size: int = 1024,
    learning_rate: float = 0.003,
    subsample: float = 0.0,
    generator: Generator | None = None,
) -> Expansion:
    """Append rows for new tokens to the tables of a model, in place; make the optimizer afterwards.

    Args:
        model: of transformers, or an ``nn.Embedding``.
        new: how many tokens, or their texts. They get the ids that follow the old ones, as ``tokenizer.add_tokens`` does.
        head: the output layer of a bare embedding, tied or not.
        pieces: for each new token its ids in the old tokenizer, or a function from its text to these. A token without
            pieces gets the mean.
        coefficients: (new, old rows) for "convex", dense or sparse; a pair for input and output tables.
        text: sequences of ids of the new tokenizer, for "cw2v".
        tokens: how many tokens the old tokenizer has, where the tables have spare rows behind them; spare rows are used
            first, count for no mean, and else stay as they are.
        strategy, scale, pad_to_multiple_of: see the table above; rows are a multiple of the latter.
        rank, window, negatives, negative_weight, steps, batch_size, learning_rate, subsample: of "cw2v", see
            :func:`weft.init.constrained_word2vec.constrained_word2vec`.
        generator: of torch, on the CPU; torch's global one if None.

    Raises:
        RecipeError: what the strategy needs is missing or does not fit, or the tables cannot grow (quantised, sharded,
            without values, computed by a weight function). Nothing is changed then.

    Source: arXiv:2407.05841.

    >>> embedding, head = nn.Embedding(4, 3), nn.Linear(3, 4)
    >>> done = extend_vocabulary_(embedding, ["ab", "abc"], head=head, pieces=[[0, 1], [0, 1, 2]])
    >>> embedding.weight.shape, torch.equal(embedding.weight[4], embedding.weight[:2].mean(0))
    (torch.Size([6, 3]), True)
    >>> done.output.to_dense()[0]
    tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    config = configure(Vocabulary, {k: v for k, v in locals().items() if k in Vocabulary.__dataclass_fields__})
    tables = Tables(model, head)
    if isinstance(new, str):
        raise RecipeError(f"New tokens are a list of texts, got one text; write [{new!r}].")
    names = None if isinstance(new, int) else list(new)
    count = new if isinstance(new, int) else len(new)
    used = tables.rows if tokens is None else tokens
    if count < 0 or not 0 < used <= tables.rows:
        raise RecipeError(
            f"Tables of {tables.rows} rows cannot take {count} tokens after {used}: a vocabulary only grows here, and "
            "tokens=... is the size of the old tokenizer, at most that of the tables."
        )
    if names is not None and len(set(names)) < count:
        twice = next(n for i, n in enumerate(names) if n in names[:i])
        raise RecipeError(f"The new token {twice!r} is given twice; a token has one id.")
    source = torch.full((multiple(max(tables.rows, used + count), config.pad_to_multiple_of),), NO_TOKEN)
    source[: tables.rows] = torch.arange(tables.rows)
    source[used : used + count] = NEW
    return fill(tables, source, torch.arange(used), names, pieces, coefficients, text, config, generator)


def replace_vocabulary_(
    model: nn.Module,
    old: Mapping[str, int],
    new: Mapping[str, int],
    *,
    head: nn.Module | None = None,
    pieces: Pieces | None = None,
    coefficients: Tensor | tuple[Tensor, Tensor] | None = None,
    text: Iterable[Sequence[int]] | None = None,
    shrink: bool = False,
    generator: Generator | None = None,
    **options: Any,
) -> Expansion:
    """Give a model the vocabulary of another tokenizer, in place; make the optimizer afterwards.

    Rows of tokens that both have move to their new ids; all others are made. The padding row and the configuration's
    token ids (``eos_token_id``, …) follow their tokens. The hull theorem speaks of old tokens, so it protects
    decoding only as far as these are kept.

    Args:
        model, head, text, generator: as for :func:`extend_vocabulary_`.
        old, new: ids by token, as ``tokenizer.get_vocab()`` gives.
        pieces, coefficients: for new tokens in order of their ids; ``pieces`` as a function gets the token as it is
            written in ``new``.
        shrink: allow tables with fewer rows than before.
        options: fields of :class:`Vocabulary`.

    Raises:
        RecipeError: as for :func:`extend_vocabulary_`; two tokens have one id, ids are out of range, or the vocabulary
            would shrink.

    Source: arXiv:2407.05841.

    >>> embedding = nn.Embedding(2, 3)
    >>> a = embedding.weight[0].clone()
    >>> done = replace_vocabulary_(embedding, {"a": 0, "b": 1}, {"b": 0, "a": 1, "c": 2}, strategy="mean")
    >>> torch.equal(embedding.weight[1], a), done.made
    (True, tensor([2]))
    """
    config = configure(Vocabulary, options)
    tables = Tables(model, head)
    for which, vocabulary in (("old", old), ("new", new)):
        tokens = {index: token for token, index in vocabulary.items()}  # of one id, the last
        for token, index in vocabulary.items():
            if tokens[index] != token or index < 0:
                raise RecipeError(
                    f"In the {which} vocabulary {token!r} and {tokens[index]!r} have the id {index}; every token needs an id "
                    "of its own, from 0."
                )
    if not old or not new or max(old.values()) >= tables.rows:
        raise RecipeError(
            f"The old vocabulary has ids up to {max(old.values(), default=None)}, the tables {tables.rows} rows, the new "
            f"vocabulary {len(new)} tokens; is `old` the tokenizer that the model was trained with?"
        )
    size = multiple(max(new.values()) + 1, config.pad_to_multiple_of)
    if size < tables.rows and not shrink:
        raise RecipeError(
            f"The new vocabulary needs {size} rows, the tables have {tables.rows}; pass shrink=True to drop rows, or "
            "pad_to_multiple_of to keep their number."
        )
    source = torch.full((size,), NO_TOKEN)
    source[list(new.values())] = torch.tensor([old.get(token, NEW) for token in new])
    names = [token for token, _ in sorted(new.items(), key=lambda item: item[1]) if token not in old]
    used = torch.tensor(sorted(old.values()))
    done = fill(tables, source, used, names, pieces, coefficients, text, config, generator)
    return replace(done, unset=tables.move_special(old, new))


def hull_violation(old: Tensor, new: Tensor, hidden: Tensor) -> Tensor:
    """By how much the best new token's logit exceeds the best old one's, for each hidden state.

    At most 0, up to rounding, for new rows that are weighted means of old ones. A bias is a last column of the rows, with
    a 1 behind each of ``hidden``.

    Args:
        old: (old, width) output rows.
        new: (new, width) output rows.
        hidden: (…, width) states in front of the head.

    Returns:
        (…), in units of logits; positive where a new token wins.

    Raises:
        RecipeError: widths differ, or there are no rows.

    Source: arXiv:2407.05841, theorem on the convex hull.

    >>> hull_violation(torch.eye(2), torch.tensor([[0.5, 0.5]]), torch.tensor([3.0, 1.0]))
    tensor(-1.)
    """
    shapes = [list(t.shape) for t in (old, new, hidden)]
    if old.dim() != 2 or new.dim() != 2 or not len(old) or not len(new) or len({s[-1] for s in shapes if s}) != 1:
        raise RecipeError(f"Rows (old, width) and (new, width) and states (…, width) are needed, got {shapes}.")
    dtype = torch.promote_types(
        torch.promote_types(hidden.dtype, torch.promote_types(old.dtype, new.dtype)), torch.float32
    )
    best_new, best_old = ((hidden.to(dtype) @ rows.to(dtype).mT).amax(dim=-1) for rows in (new, old))
    return best_new - best_old


def _trial() -> nn.Module:
    return nn.ModuleDict({"embedding": nn.Embedding(12, 8), "head": nn.Linear(8, 12)})


def _apply(model: Any, generator: Generator | None, steps: int, **parameters: Any) -> Expansion:
    return extend_vocabulary_(
        model["embedding"],
        ["ab", "bc", "abc"],
        head=model["head"],
        pieces=[[0, 1], [1, 2], [0, 1, 2]],
        text=[[12, 2, 3, 13, 4, 14], [0, 13, 14, 5]],
        generator=generator,
        steps=min(steps, 10),  # the text has 10 tokens
        **parameters,
    )


def _row(name: str, random: bool, summary: str, *checked_by: str, **defaults: Any) -> InitMethod:
    return InitMethod(
        name=name, family="init", config=Vocabulary, summary=summary, goal="adapt", paper="cw2v",
        needs="calibration" if name == "cw2v" else "nothing", defaults=defaults, checked_by=checked_by,
        function=extend_vocabulary_, trial=_trial, apply=_apply, random=random, resizes=True,
        fills=("embedding.weight", "head.weight", "head.bias"),
    )  # fmt: skip


METHODS = (
    _row("vocabulary_subword_mean", False, "New tokens' rows are the means of their pieces' rows.", "closed form"),
    _row("vocabulary_mean", False, "New tokens' rows are the mean of all old ones.", "closed form", strategy="mean"),
    _row("vocabulary_univariate", True, "New tokens' rows are drawn column by column.", "closed form", strategy="univariate"),
    _row(
        "vocabulary_multivariate", True, "New tokens' rows are drawn near the mean, with the old ones' covariance.",
        "closed form", "transformers", strategy="multivariate",
    ),
    _row("cw2v", True, "New tokens' rows are weighted means of old ones, learned from text.", "brute force", strategy="cw2v"),
)  # fmt: skip
