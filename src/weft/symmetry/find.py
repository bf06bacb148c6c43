"""Find a model's symmetry: a live model with example inputs, or a transformers folder by its configuration alone."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import CheckpointError, MissingDependencyError, RecipeError
from weft.symmetry.collect import collect
from weft.symmetry.groups import Symmetry
from weft.symmetry.trace import trace

# sizes of made-up inputs: primes, so that no size of a model is taken for one of them
BATCH, LENGTH, TARGET_LENGTH = 3, 13, 11


def find_symmetry(model: Any, inputs: Any = None) -> Symmetry:
    """Find which axes of which tensors of a model permute together without changing its function.

    The forward pass is traced, not computed: a model on the meta device will do, and a large one costs seconds.

    Args:
        model: a ``torch.nn.Module``, or the folder of a transformers model, whose weights are not read.
        inputs: an example: a tensor, a tuple of positional arguments, or a mapping of keyword arguments. Models of
            transformers need none. Axes of inputs and outputs keep their order.

    Returns:
        Groups that permute together, and all frozen axes with reasons.

    Raises:
        RecipeError: the model cannot be traced, has no parameters, or needs example inputs.
        CheckpointError: the folder has no configuration that transformers knows.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> symmetry = find_symmetry(model, torch.zeros(5, 3))
    >>> [(g.name, g.size, g.tensors) for g in symmetry.groups]
    [('0.intermediate', 8, ('0.weight', '0.bias', '2.weight'))]
    >>> symmetry.why_frozen("2.weight", 0)
    ('an output of the model',)
    """
    if isinstance(model, str | os.PathLike):
        model = meta_model(model)
    if not isinstance(model, nn.Module):
        raise RecipeError(f"A symmetry is found for a torch.nn.Module or a folder, got {type(model).__name__}.")
    args, kwargs = _arguments(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export and of old code in models
        return collect(trace(model, args, kwargs))


def meta_model(folder: str | os.PathLike[str]) -> nn.Module:
    """A transformers model without weights, from ``config.json`` alone; no code from the folder is run."""
    path = Path(folder).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.name != "config.json" or not file.is_file():
        raise CheckpointError(f"{path}: no config.json. A symmetry on disk is found from a transformers folder.")
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            "transformers is needed to build a model from its configuration: pip install weft[hf]."
        ) from None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        config = transformers.AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: transformers cannot read this configuration ({str(error)[:300]}).") from None
    name = (raw.get("architectures") or [""])[0]
    known = getattr(transformers, name, None) if name else None
    with torch.device("meta"):
        return known(config) if known is not None else transformers.AutoModel.from_config(config)


def _arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if inputs is None:
        return (), _made_up(model, device)
    if isinstance(inputs, Mapping):
        return (), {str(name): _on(value, device) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return tuple(_on(value, device) for value in inputs), {}
    return (_on(inputs, device),), {}


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _made_up(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Inputs of a transformers model by what its configuration says."""
    name = getattr(model, "main_input_name", None)
    config = getattr(model, "config", None)
    if name is None or config is None:
        raise RecipeError(
            "The model needs example inputs: find_symmetry(model, inputs), as its forward pass takes them."
        )
    if name == "pixel_values":
        height, width = size if isinstance(size := config.image_size, list | tuple) else (size, size)
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        shape = (BATCH, getattr(config, "num_channels", 3), height, width)
        return {name: torch.zeros(shape, dtype=dtype, device=device)}
    if name != "input_ids":
        raise RecipeError(f"The model takes {name}; give an example: find_symmetry(model, {{{name!r}: tensor}}).")
    longest = getattr(config, "max_position_embeddings", None) or LENGTH
    made = {name: torch.zeros(BATCH, min(LENGTH, longest), dtype=torch.long, device=device)}
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = torch.zeros(BATCH, min(TARGET_LENGTH, longest), dtype=torch.long, device=device)
    return made
