"""A model as a graph by ``torch.export``: in evaluation, without caches, and put back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from weft.errors import RecipeError
from weft.symmetry.experts import opaque_experts

_FLASH = ("flash_attention_2", "flash_attention_3", "flex_attention")


def export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An exported program; nothing is computed.

    Raises:
        RecipeError: the model cannot be exported, with torch's reason.
    """
    with _quiet(model), opaque_experts(model), torch.no_grad():
        try:
            program = torch.export.export(model, args, dict(kwargs), strict=False)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RecipeError(
                "The model cannot be traced: its forward pass must not depend on the values of tensors, and must accept "
                f"the example inputs. torch.export says: {type(error).__name__}: {' '.join(reason[:3])[:600]} "
                "Likely cause: an `if` or a loop over tensor values, or inputs of another form. Trace the part of the "
                "model without it, or give other inputs."
            ) from error
    return program


def tensor_names(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """First names of all tensors that a state dict has, with shapes, and further names of the same tensors."""
    first: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    stored = set(model.state_dict(keep_vars=True))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if name not in stored:
            continue
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            shapes[name] = tuple(tensor.shape)
    if not any(True for _ in model.parameters()):
        shapes = {}
    return shapes, aliases


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation, without caches, with an attention that a trace can see; all is put back."""
    training = {module: module.training for module in model.modules()}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = []
    for config in configs.values():
        for name, refused, value in (("use_cache", (True,), False), ("_attn_implementation", _FLASH, "sdpa")):
            if getattr(config, name, None) in refused:
                before.append((config, name, getattr(config, name)))
                setattr(config, name, value)
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config, name, old in before:
            setattr(config, name, old)
