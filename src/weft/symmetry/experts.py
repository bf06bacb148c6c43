"""Fused experts: one opaque operation for each class of transformers' experts, so that a trace does not see their loop.

transformers keeps all experts of a layer in one tensor (experts, out, in), or (experts, in, out) where the class says
``is_transposed``; gate and up stand one after the other, or alternate where ``is_concatenated`` is false.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FLAGS = {"has_gate": True, "is_transposed": False, "is_concatenated": True}


@torch.library.custom_op("weft::experts", mutates_args=())
def _experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    has_gate: bool,
    is_transposed: bool,
    is_concatenated: bool,
) -> Tensor:
    """Stands in a traced graph for Σ_k weights[t, k] · expert[index[t, k]](hidden[t]); it is never computed."""
    raise NotImplementedError("weft::experts only stands in traced graphs")


@_experts.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts as transformers' classes do."""
    return isinstance(getattr(module, "down_proj", None), nn.Parameter) and hasattr(type(module), "_apply_gate")


@contextmanager
def opaque_experts(model: nn.Module) -> Iterator[None]:
    """For the length of a ``with``: fused experts run as one operation, ``weft::experts``."""
    changed = [module for module in model.modules() if is_experts(module)]
    for module in changed:
        module.__dict__["forward"] = _forward(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _forward(module: Any) -> Any:
    flags = {name: bool(getattr(module, name, default)) for name, default in FLAGS.items()}
    name = "gate_up_proj" if flags["has_gate"] else "up_proj"

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return torch.ops.weft.experts(
            hidden, top_k_index, top_k_weights, getattr(module, name), getattr(module, f"{name}_bias", None),
            module.down_proj, getattr(module, "down_proj_bias", None), *flags.values(),
        )  # fmt: skip

    return forward
