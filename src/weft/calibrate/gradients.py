"""Mean gradients and Fisher diagonals: what the loss of each sample says about each parameter.

With ℓ(x, y) = −log p(y | x) and gradients by the parameters θ, over N samples:

    mean gradient        1/N Σₙ ∇ℓ(xₙ, yₙ)                             labels are given
    Fisher, exact        1/N Σₙ Σ_c p(c | xₙ) (∇ℓ(xₙ, c))²             all classes of a classifier
    Fisher, sampled      1/N Σₙ (∇ℓ(xₙ, ŷₙ))²,  ŷₙ ~ p(· | xₙ)         its expectation is the exact one
    Fisher, empirical    1/N Σₙ (∇ℓ(xₙ, yₙ))²                          labels are given; not the Fisher information

Squares are of the gradients of single samples, which is not the square of a batch's gradient. A sample is a row of a
batch; the ℓ of a row of tokens is the sum over its tokens that have a label, each predicted from the given ones before it
(or around it), so ``sampled`` draws each token's label from the model's prediction at that place.

The whole model is in memory, in evaluation, with gradients of its own size; sums are float64 (8 bytes a parameter and
statistic). Time: a forward and a backward pass for each sample, ``exact`` one for each sample and class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate.data import IGNORED
from weft.calibrate.per_sample import encodes, evaluating, logits_of, per_sample_gradients, run, shifts
from weft.errors import RecipeError

GRADIENTS = ("gradient", "fisher_exact", "fisher_sampled", "fisher_empirical")


def mean_gradient(
    model: nn.Module, batches: Iterable[Any], labels: Iterable[Tensor] | None = None, *, vectorized: bool = False
) -> dict[str, Tensor]:
    """The mean over all samples of the gradient of −log p(label).

    Args:
        model: a classifier or a language model, with logits (rows, classes) or (rows, tokens, classes).
        batches: as for :class:`weft.calibrate.Walk`; labels are those of a mapping (−100: none), or
        labels: for each batch (rows,) or (rows, tokens), where batches are no mappings with ``labels``.
        vectorized: the samples of a batch together, by ``torch.func.vmap``: faster for small models, with the memory of
            one gradient for each row; not every model can.

    Returns:
        Float64 of each parameter's shape, by the parameters' names.

    Raises:
        RecipeError: labels are missing or do not fit, or the outputs are no logits.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> mean_gradient(layer, [torch.ones(1, 2)], [torch.tensor([0])])["weight"].tolist()
    [[-0.5, -0.5], [0.5, 0.5]]
    """

    def one(batch: Any, given: Tensor | None, add: _Add) -> None:
        chosen = _given_labels(batch, given)
        add(batch, chosen, torch.ones(len(chosen), dtype=torch.float64), 1)

    return _sums(model, batches, labels, one, vectorized)


def fisher_exact(model: nn.Module, batches: Iterable[Any], *, vectorized: bool = False) -> dict[str, Tensor]:
    """The diagonal of a classifier's Fisher information, by all of its classes.

    Args, returns: see :func:`mean_gradient`; labels are not used.

    Raises:
        RecipeError: logits are not (rows, classes); of tokens, all sequences would have to be gone through.

    >>> layer = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> fisher_exact(layer, [torch.ones(1, 1)])["weight"].tolist()
    [[0.25], [0.25]]
    """

    def one(batch: Any, _: Tensor | None, add: _Add) -> None:
        logits = logits_of(run(model, batch))
        if logits.dim() != 2:
            raise RecipeError(
                f"The exact Fisher information needs logits (rows, classes), and {type(model).__name__} gives "
                f"{list(logits.shape)}: the labels of all tokens together are too many to sum over. Use fisher_sampled."
            )
        shares = logits.double().softmax(1)
        for label in range(logits.shape[1]):
            add(batch, torch.full((len(logits),), label, device=logits.device), shares[:, label], 2, label == 0)

    return _sums(model, batches, None, one, vectorized)


def fisher_sampled(
    model: nn.Module,
    batches: Iterable[Any],
    labels: Iterable[Tensor] | None = None,
    *,
    generator: torch.Generator,
    draws: int = 1,
    vectorized: bool = False,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, estimated with labels drawn from the model's predictions.

    Args, returns: see :func:`mean_gradient`; of given labels only the places where there is none (−100) are used.

    Args:
        generator: of the draws.
        draws: labels for each sample; the error falls with the root of their number.

    Raises:
        RecipeError: the outputs are no logits.

    >>> layer = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> fisher_sampled(layer, [torch.ones(1, 1)], generator=torch.Generator().manual_seed(0))["weight"].tolist()
    [[0.25], [0.25]]
    """
    if draws < 1:
        raise RecipeError(f"draws must be a positive whole number, got {draws!r}.")

    def one(batch: Any, given: Tensor | None, add: _Add) -> None:
        logits = logits_of(run(model, batch))
        known = _find_labels(batch, given)
        if known is None and logits.dim() == 3 and isinstance(batch, Mapping):
            mask = batch.get("decoder_attention_mask" if encodes(model) else "attention_mask")
            known = None if mask is None else torch.where(mask.bool(), 0, IGNORED)
        shares = logits.float().softmax(-1).flatten(0, -2)
        for draw in range(draws):
            drawn = torch.multinomial(shares.cpu(), 1, generator=generator).view(logits.shape[:-1]).to(logits.device)
            if logits.dim() == 3 and shifts(model):  # place t predicts token t + 1
                drawn = drawn.roll(1, 1)
            if known is not None:
                drawn = drawn.masked_fill(known.to(drawn.device) == IGNORED, IGNORED)
            add(batch, drawn, torch.full((len(drawn),), 1 / draws, dtype=torch.float64), 2, draw == 0)

    return _sums(model, batches, labels, one, vectorized)


def fisher_empirical(
    model: nn.Module, batches: Iterable[Any], labels: Iterable[Tensor] | None = None, *, vectorized: bool = False
) -> dict[str, Tensor]:
    """The mean over all samples of the squared gradient of −log p(label): often called Fisher, equal to it only where the
    model's predictions are the law of the labels.

    Args, returns, raises: see :func:`mean_gradient`.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> fisher_empirical(layer, [torch.eye(2)], [torch.tensor([0, 1])])["weight"].tolist()
    [[0.125, 0.125], [0.125, 0.125]]
    """

    def one(batch: Any, given: Tensor | None, add: _Add) -> None:
        chosen = _given_labels(batch, given)
        add(batch, chosen, torch.ones(len(chosen), dtype=torch.float64), 2)

    return _sums(model, batches, labels, one, vectorized)


_Add = Callable[..., None]  # (batch, labels, weights of rows, power, rows count): adds to the sums


def _sums(
    model: nn.Module,
    batches: Iterable[Any],
    labels: Iterable[Tensor] | None,
    one: Callable[..., None],
    vectorized: bool,
) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    rows = 0

    def add(batch: Any, chosen: Tensor, weights: Tensor, power: int, counts: bool = True) -> None:
        nonlocal rows
        valid = (chosen != IGNORED).flatten(1).any(1) if chosen.dim() > 1 else chosen != IGNORED
        rows += int(valid.sum()) if counts else 0
        for start, gradients in per_sample_gradients(model, batch, chosen, vectorized=vectorized):
            for name, gradient in gradients.items():
                part = weights[start : start + len(gradient)].to(gradient.device)
                part = torch.tensordot(part, gradient.double() ** power, 1)
                totals[name] = totals[name].add_(part) if name in totals else part

    given = iter(labels) if labels is not None else None
    with evaluating(model):
        for number, batch in enumerate(batches):
            mine = next(given, None) if given is not None else None
            if given is not None and mine is None:
                raise RecipeError(f"There are labels for {number} batches, and there are more batches.")
            one(batch, mine, add)
    if not rows:
        raise RecipeError("There are no labels in the data, so there is no gradient.")
    return {name: total / rows for name, total in totals.items()}


def _find_labels(batch: Any, given: Tensor | None) -> Tensor | None:
    return batch.get("labels") if given is None and isinstance(batch, Mapping) else given


def _given_labels(batch: Any, given: Tensor | None) -> Tensor:
    labels = _find_labels(batch, given)
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise RecipeError(
            "This statistic needs the labels of the data, whole numbers: batches with labels, or labels for each batch. "
            "fisher_exact and fisher_sampled need none."
        )
    return labels
