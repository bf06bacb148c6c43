"""Batches through a model in evaluation, for whatever reads statistics off its layers.

A batch is what the model takes: a tensor, a tuple of positional or a mapping of named arguments.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import RecipeError

IGNORED_LABEL = -100  # torch's default for positions that count in no loss


def feed(model: nn.Module, batch: Any) -> Any:
    """What the model makes of a batch.

    Args:
        model: any module.
        batch: a tensor, a tuple or list of positional arguments, or a mapping of named ones.

    Raises:
        RecipeError: it is text, or an embedding has no row of a number in it.

    >>> feed(nn.Identity(), (torch.ones(2),))
    tensor([1., 1.])
    """
    with _rows_are_there(model):
        return _call(model, batch)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    positional = batch if isinstance(batch, tuple | list) else [batch]
    if any(isinstance(value, str) for value in positional):
        raise RecipeError(
            "a str is no batch: the model takes tensors. Give what a tokenizer makes of the texts, as "
            'tokenizer(texts, padding=True, return_tensors="pt").'
        )
    return model(*positional)


@contextmanager
def _rows_are_there(model: nn.Module) -> Iterator[None]:
    """For the length of a ``with``: check what embeddings look up, which fails late and without a name on a GPU."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def check(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            rows = args[0] if args else named.get("input")
            if not isinstance(rows, Tensor) or not rows.numel() or rows.is_meta:
                return
            low, high, size = int(rows.min()), int(rows.max()), int(module.num_embeddings)
            if low < 0 or high >= size:
                raise RecipeError(
                    f"the data hold the id {low if low < 0 else high}, and {path or 'the embedding'} has {size:,} rows, of the "
                    f"ids 0 to {size - 1:,}. Ids of tokens come from another tokenizer, or tokens were added without "
                    "model.resize_token_embeddings(len(tokenizer)); ids of positions, from texts that are too long."
                )

        return check

    tables = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    handles = [m.register_forward_pre_hook(hook(p), with_kwargs=True) for p, m in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """For the length of a ``with``: evaluation without gradients; each module's mode comes back.

    >>> model = nn.Linear(1, 1)
    >>> with evaluating(model):
    ...     model.training, torch.is_grad_enabled()
    (False, False)
    >>> model.training
    True
    """
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def counted(batch: Any, *, labels: bool = True) -> list[Tensor]:
    """Masks of a batch of named arguments, true at tokens that count: not padding, and with ``labels`` part of a loss.

    Args:
        batch: as for :func:`feed`; only mappings have masks.
        labels: leave positions out whose label is −100.

    Returns:
        Boolean tensors, (batch, length) as a rule: of ``attention_mask`` where it has two axes, and of ``labels``.

    >>> counted({"attention_mask": torch.tensor([[1, 0]])})
    [tensor([[ True, False]])]
    """
    if not isinstance(batch, Mapping):
        return []
    masks = []
    attention, target = batch.get("attention_mask"), batch.get("labels")
    if isinstance(attention, Tensor) and attention.dim() == 2:
        masks.append(attention.bool())
    if labels and isinstance(target, Tensor) and not target.is_floating_point():
        masks.append(target != IGNORED_LABEL)
    return masks


def rows_of(x: Tensor, masks: list[Tensor]) -> Tensor:
    """(…, features) -> (tokens, features): the tokens that every mask of their shape counts.

    >>> rows_of(torch.ones(2, 3, 4), [torch.tensor([[True, True, False], [True, False, False]])]).shape
    torch.Size([3, 4])
    """
    keep = None
    for mask in masks:
        if mask.shape == x.shape[:-1]:
            keep = mask if keep is None else keep & mask
    return x.reshape(-1, x.shape[-1]) if keep is None else x[keep.to(x.device)]


@contextmanager
def layer_inputs(layers: Mapping[str, Sequence[nn.Module]], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """For the length of a ``with``: call ``visit(name, x)`` before each call of a layer, with its first argument.

    Args:
        layers: by any name, one or several that count as one.
        visit: what to do with the input of a call.

    >>> layer, shapes = nn.Linear(3, 2), []
    >>> with layer_inputs({"a": [layer]}, lambda name, x: shapes.append((name, *x.shape))):
    ...     _ = layer(torch.ones(5, 3))
    >>> shapes
    [('a', 5, 3)]
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, named: visit(name, args[0] if args else next(iter(named.values())))

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, ms in layers.items() for m in ms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fed_alike(model: nn.Module, layers: Mapping[str, Sequence[nn.Module]], batch: Any) -> dict[str, str]:
    """For each name the first name whose layers are fed the very same tensors in a pass, as q, k and v are.

    Names whose layers do not run are left out.

    >>> class Pair(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.q, self.k = nn.Linear(3, 3), nn.Linear(3, 3)
    ...     def forward(self, x):
    ...         return self.q(x) + self.k(x)
    >>> model = Pair()
    >>> fed_alike(model, {"q": [model.q], "k": [model.k]}, torch.ones(2, 3))
    {'q': 'q', 'k': 'q'}
    """
    known: dict[int, tuple[Any, int, int]] = {}  # by id: a weak reference, the tensor's version, its number
    fed: dict[str, list[int]] = {name: [] for name in layers}
    numbers = itertools.count()

    def note(name: str, x: Tensor) -> None:
        entry = known.get(id(x))
        if entry is None or entry[0]() is not x or entry[1] != x._version:  # an id may be that of a dead tensor
            entry = known[id(x)] = (weakref.ref(x), x._version, next(numbers))
        fed[name].append(entry[2])

    with layer_inputs(layers, note):
        feed(model, batch)
    first: dict[tuple[int, ...], str] = {}
    return {name: first.setdefault(tuple(calls), name) for name, calls in fed.items() if calls}
