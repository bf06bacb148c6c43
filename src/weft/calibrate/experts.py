"""Fused experts as one linear layer each, so that statistics and methods meet them as they meet any other layer.

transformers keeps the matrices of all experts in one parameter, (experts, out, in) or (experts, in, out), and multiplies
by slices of it. Here each slice is a linear layer over the same memory: what is written to it is written to the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NAMES = ("gate_up_proj", "up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts as transformers' classes do."""
    return isinstance(getattr(module, "down_proj", None), nn.Parameter) and hasattr(type(module), "_apply_gate")


class Slice(nn.Linear):
    """One expert's matrix (out, in), a view of the fused parameter; a transposed one is turned.

    Attributes:
        experts: the module that holds the fused parameter.
        part: the parameter's name.
        index: which expert's matrix it is.
        rows: while it runs, which tokens of the block its input rows are.
    """

    rows: Tensor | None = None

    def __init__(self, experts: Any, name: str, index: int):
        nn.Module.__init__(self)
        self.part, self.index = name, index
        self.__dict__["experts"] = experts  # no child: its weights are these
        fused = getattr(experts, name).detach()[index]
        self.weight = nn.Parameter(fused.mT if experts.is_transposed else fused, requires_grad=False)
        bias = getattr(experts, f"{name}_bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach()[index], requires_grad=False)
        self.out_features, self.in_features = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)."""
        return functional.linear(x, self.weight, self.bias)


@contextmanager
def unfused(block: nn.Module, name: str = "") -> Iterator[dict[str, Slice]]:
    """For the length of a ``with``: the experts in a block run through one linear layer each.

    Args:
        block: a block whose weights are loaded.
        name: its full name.

    Yields:
        The layers by full name, ``….experts.3.down_proj``; empty where there are no experts.
    """
    layers: dict[str, Slice] = {}
    before: list[tuple[nn.Module, Any]] = []
    for path, module in block.named_modules():
        if not is_experts(module):
            continue
        prefix = ".".join(p for p in (name, path) if p)
        own: dict[tuple[str, int], Slice] = {}
        for part in NAMES:
            fused = getattr(module, part, None)
            if isinstance(fused, nn.Parameter):
                for index in range(fused.shape[0]):
                    own[part, index] = layers[f"{prefix}.{index}.{part}"] = Slice(module, part, index)
        before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = _forward(module, own)
    try:
        yield layers
    finally:
        for module, forward in before:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _forward(experts: Any, layers: dict[tuple[str, int], Slice]) -> Any:
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    count = 1 + max(index for _, index in layers)

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the eager implementation computes, in its order: hidden (tokens, width), two of (tokens, k)."""
        out = torch.zeros_like(hidden)
        for index in range(count):
            token, position = torch.where(top_k_index == index)
            position, order = position.sort(stable=True)  # the eager implementation goes by position, then by token
            token = token[order]
            if not len(token):
                continue
            enter, leave = layers[first, index], layers["down_proj", index]
            enter.rows = leave.rows = token
            y = enter(hidden[token])
            y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
            y = leave(y) * top_k_weights[token, position, None]
            enter.rows = leave.rows = None
            out.index_add_(0, token, y.to(out.dtype))
        return out

    return forward
