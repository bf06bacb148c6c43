"""Save a model that carries functions as if its weights were plain: no reader ever meets ``parametrizations.*`` names."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weft.errors import CheckpointError, OutputError
from weft.function.attach import bake_
from weft.function.classes import Carrier, compute

MARK = "parametrizations."


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A state dict with every computed weight in place of its function's parts.

    Args:
        model: with or without functions.

    Returns:
        Names as the plain model has them; computed weights are detached copies, tied names share one tensor.

    >>> import weft
    >>> from weft.normalize import WeightStandardization
    >>> layer = nn.Linear(3, 2)
    >>> _ = weft.parametrize_(layer, WeightStandardization())
    >>> sorted(plain_state_dict(layer))
    ['bias', 'weight']
    """
    state = {n: v for n, v in model.state_dict().items() if MARK not in n}
    computed: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Carrier):
            for name in module.weft_names:
                stack = module.parametrizations[name]  # type: ignore[index]
                if id(stack) not in computed:
                    computed[id(stack)] = compute(stack).contiguous()  # type: ignore[arg-type]
                state[f"{path}.{name}" if path else name] = computed[id(stack)]
    return state


def save(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """Save a model with baked weights; the model itself keeps its functions.

    Args:
        model: a transformers model (saved by its own ``save_pretrained``) or any module (saved as model.safetensors).
        folder: where; made if missing.
        options: passed on to ``save_pretrained``.

    Raises:
        OutputError: the folder cannot be written.
    """
    baked = copy.deepcopy(model)
    bake_(baked)
    if hasattr(baked, "save_pretrained"):
        baked.save_pretrained(folder, **options)
        return
    from safetensors.torch import save_model

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(baked, str(Path(folder) / "model.safetensors"))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error}).") from None


def refuse_unbaked(names: Any) -> None:
    """Raise ``CheckpointError`` if a state dict holds the parts of functions instead of weights."""
    found = [n for n in names if MARK in n]
    if found:
        raise CheckpointError(
            f"The state dict holds {found[0]!r}: it was saved from a model with weight functions attached, and loading "
            "it into a plain model would leave those layers at random values. Save with weft.save or after weft.bake_, "
            "or attach the same functions before loading."
        )
