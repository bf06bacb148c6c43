"""Gradients of the log-likelihood of single samples, one after another or by ``torch.func.vmap``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.calibrate.data import IGNORED
from weft.errors import RecipeError


def per_sample_gradients(
    model: nn.Module, batch: Any, labels: Tensor, *, vectorized: bool = False
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Gradients of −log p(labels) for each row of a batch.

    Args:
        model: in evaluation; parameters need not require gradients, and get none.
        batch: a tensor, a tuple of positional or a mapping of named arguments; what has as many rows as ``labels`` is cut.
        labels: (rows,) or (rows, tokens), −100 where there is none.
        vectorized: all rows together.

    Yields:
        The number of the first row, and gradients (rows, …) by the parameters' names.

    >>> layer = nn.Linear(2, 2)
    >>> [(start, g["bias"].shape) for start, g in per_sample_gradients(layer, torch.ones(2, 2), torch.tensor([0, 1]))]
    [(0, torch.Size([1, 2])), (1, torch.Size([1, 2]))]
    """
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.is_floating_point()}
    names, values = _flat(batch)
    cut = [v for v in values if _has_rows(v, len(labels))]

    def loss(weights: dict[str, Tensor], row_labels: Tensor, *rows: Tensor) -> Tensor:
        given = iter(rows)
        row = [next(given).unsqueeze(0) if _has_rows(v, len(labels)) else v for v in values]
        args, kwargs = _unflat(names, row)
        return -_log_likelihood(
            model, torch.func.functional_call(model, weights, args, kwargs), row_labels.unsqueeze(0)
        )

    gradient = torch.func.grad(loss)
    if vectorized:
        over = torch.func.vmap(gradient, in_dims=(None, *[0] * (1 + len(cut))))
        yield 0, over(parameters, labels, *cut)
        return
    needed = {n: p.requires_grad_() for n, p in parameters.items()}  # detached from the model's own
    for row in range(len(labels)):
        with torch.enable_grad():
            value = loss(needed, labels[row], *(c[row] for c in cut))
            found = torch.autograd.grad(value, list(needed.values()), allow_unused=True, materialize_grads=True)
        yield row, {name: g.detach().unsqueeze(0) for name, g in zip(needed, found)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of a model in evaluation for the length of a ``with``; then each as it was."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _flat(batch: Any) -> tuple[Sequence[str] | None, list[Any]]:
    """Arguments without labels, which would make a model compute a loss of its own."""
    if isinstance(batch, Mapping):
        names = [n for n in batch if n != "labels"]
        return names, [batch[n] for n in names]
    return None, list(batch) if isinstance(batch, tuple | list) else [batch]


def _unflat(names: Sequence[str] | None, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (tuple(values), {}) if names is None else ((), dict(zip(names, values)))


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


@torch.no_grad()
def run(model: nn.Module, batch: Any) -> Any:
    """The outputs for a batch, without a loss."""
    args, kwargs = _unflat(*_flat(batch))
    return model(*args, **kwargs)


def logits_of(output: Any) -> Tensor:
    """Logits (rows, classes) or (rows, tokens, classes) from a model's output.

    Raises:
        RecipeError: there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        raise RecipeError(
            f"Gradients need a model that returns logits (rows, classes) or (rows, tokens, classes); this one returns "
            f"{type(output).__name__}{list(output.shape) if isinstance(output, Tensor) else ''}."
        )
    return logits


def encodes(model: Any) -> bool:
    """Whether a model has an encoder beside its decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def shifts(model: Any) -> bool:
    """Whether place t of the logits predicts token t + 1."""
    return bool(getattr(model, "can_generate", lambda: False)()) and not encodes(model)


def _log_likelihood(model: nn.Module, output: Any, labels: Tensor) -> Tensor:
    logits = logits_of(output)
    if logits.dim() == 3 and shifts(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.shape[:-1] != labels.shape:
        raise RecipeError(
            f"Logits {list(logits.shape)} need labels {list(logits.shape[:-1])}, got {list(labels.shape)}."
        )
    shares = functional.log_softmax(logits.double() if logits.dtype == torch.float64 else logits.float(), -1)
    chosen = shares.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(labels == IGNORED, 0).sum()
