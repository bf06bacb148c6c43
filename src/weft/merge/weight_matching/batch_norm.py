"""Estimate the running statistics of batch norm again: those of a merged model are not the mean of its parents'."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from weft.errors import RecipeError
from weft.merge.weight_matching.activations import call, evaluation
from weft.merge.weight_matching.straight_through import batch_norms


def reset_batch_norm_(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Forget a model's running statistics and take those of some batches, each with the same say.

    Everything but batch norm runs in evaluation, so dropout does not disturb the statistics. Modes and momenta are put
    back. A model without running statistics stays as it is.

    Args:
        model: changed in place.
        batches: inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments each; of more than
            one sample, and best of one size.

    Returns:
        The model.

    Raises:
        RecipeError: no batch.

    >>> model = nn.Sequential(nn.BatchNorm1d(2))
    >>> reset_batch_norm_(model, [torch.tensor([[0.0, 2.0], [2.0, 4.0]])])[0].running_mean
    tensor([1., 3.])
    """
    layers: list[Any] = [m for m in batch_norms(model) if m.running_mean is not None]
    if not layers:
        return model
    count = 0
    kept = {layer: {n: b.clone() for n, b in layer.named_buffers(recurse=False)} for layer in layers}
    momenta = {layer: layer.momentum for layer in layers}
    try:
        with evaluation(model), torch.no_grad():
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the plain mean over batches
                layer.training = True
            for batch in batches:
                call(model, batch)
                count += 1
    finally:
        for layer in layers:
            layer.momentum = momenta[layer]
        if not count:
            for layer, buffers in kept.items():
                for name, value in buffers.items():
                    getattr(layer, name).copy_(value)
    if not count:
        raise RecipeError("Running statistics are estimated from batches, but there is none. Give at least one.")
    return model
