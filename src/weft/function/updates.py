"""Change the buffers of functions once a step: before each forward pass of a model in training.

The hook sits on the model, not on the layer: a layer is read more than once in a step where its weight is tied or its
block is checkpointed, and a change of buffers inside a checkpointed block does not compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from weft.function.stack import Stack

_HOOKED = "weft_updates"  # attribute of the modules that have the hook


def update_before_forward(model: nn.Module) -> None:
    """Have the functions in ``model`` updated before each of its forward passes in training."""
    if _HOOKED not in model.__dict__:
        model.__dict__[_HOOKED] = True
        model.register_forward_pre_hook(_update)


def stop_updating(model: nn.Module) -> None:
    """Take off hooks that have nothing left to update."""
    for module in [m for m in model.modules() if _HOOKED in m.__dict__]:
        if next(_updated(module, set()), None) is None:
            del module.__dict__[_HOOKED]
            for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _update]:
                del module._forward_pre_hooks[key]


def _update(model: Any, arguments: Any) -> None:
    if not model.training:
        return
    # a model that is checkpointed whole runs again inside the backward pass
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    for stack in _updated(model, set()):
        stack.update()


def _updated(module: Any, seen: set[nn.Module]) -> Iterator[Stack]:
    """Stacks inside a module, each once, but those inside a part that has a hook of its own."""
    for child in module._modules.values():
        if child is None or child in seen:
            continue
        seen.add(child)
        if isinstance(child, Stack):
            if child.has_update:
                yield child
        elif _HOOKED not in child.__dict__:
            yield from _updated(child, seen)
