"""Quantise a model on disk: one configuration for all layers, or one for each pattern of names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from weft.calibrate import Change, rewrite
from weft.checkpoint.checkpoint import Checkpoint


def quantize_model(
    model: Checkpoint | str | Path,
    output: str | os.PathLike[str],
    config: Change | Mapping[Any, Change],
    batches: Iterable[Any] | None = None,
    **options: Any,
) -> Path:
    """Write a copy of a transformers model whose blocks' matrices are quantised, in the model's own type.

    Each block is quantised with the inputs that the quantised blocks before it give. ``weft.json`` holds each layer's error,
    and names the layers that too few rows of the data reached, which are quantised without data.

    Args:
        model: a folder, Hub id or open checkpoint.
        output: the folder.
        config: a quantiser's configuration, or a mapping from selectors (:mod:`weft.function.where`) to these, of which the
            most specific decides.
        batches: calibration data, for methods that need it.
        options: further ones of :func:`weft.calibrate.rewrite` (``where``, ``statistics``, ``seed``, ``force``, …).

    Returns:
        The folder; it loads in transformers as the model did.
    """
    return rewrite(model, batches, config, output, recipe=describe(config), **options)


def describe(config: Change | Mapping[Any, Change]) -> dict[str, Any]:
    """A configuration, or one for each pattern, as JSON values.

    >>> from weft.quantize import RTN
    >>> describe({"*.q_proj": RTN(bits=8)})["*.q_proj"]["bits"]
    8
    """
    if isinstance(config, Mapping):
        return {key if isinstance(key, str) else repr(key): describe(one) for key, one in config.items()}
    return {"config": type(config).__name__, **(asdict(config) if is_dataclass(config) else {})}
