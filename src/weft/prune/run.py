"""Prune a model: one configuration for all layers, or one for each pattern of names; on disk or in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from weft.calibrate import Change, change_model_, rewrite
from weft.calibrate.change_model import Changed
from weft.calibrate.describe import describe
from weft.checkpoint.checkpoint import Checkpoint


def prune_(
    model: nn.Module, config: Change | Mapping[Any, Change], calibration: Iterable[Any] | None = None, **options: Any
) -> Changed:
    """Put zeros into the weights of a model in memory, in place.

    Args:
        model: any module.
        config: which weights go, or a mapping from selectors (:mod:`weft.function.where`) to configurations.
        calibration: batches, for methods that need data.
        options: further ones of :func:`weft.calibrate.change_model_` (``where``, ``statistics``, ``blocks``, …).

    Returns:
        Facts by layer.

    >>> import torch
    >>> from weft.prune import Magnitude
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = prune_(model, Magnitude(sparsity=0.75))
    >>> int(model[0].weight.count_nonzero())
    4
    """
    return change_model_(model, calibration, config, **{"autocast": True, **options})


def prune_model(
    model: Checkpoint | str | Path,
    output: str | os.PathLike[str],
    config: Change | Mapping[Any, Change],
    batches: Iterable[Any] | None = None,
    **options: Any,
) -> Path:
    """Write a pruned copy of a transformers model; one block is in memory at a time.

    Args:
        model: a folder, Hub id or open checkpoint.
        output: the folder.
        config: which weights go, or a mapping from selectors (:mod:`weft.function.where`) to configurations.
        batches: calibration data, for methods that need data.
        options: further ones of :func:`weft.calibrate.rewrite` (``where``, ``statistics``, ``force``, …).

    Returns:
        The folder; it loads in transformers as the model did.
    """
    return rewrite(model, batches, config, output, recipe=describe(config), **{"autocast": True, **options})
