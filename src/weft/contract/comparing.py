"""What the checks of weight functions compare: outputs, states and gradients of a small model, to rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.contract.models import Net, attach
from weft.function.protocol import FunctionMethod

# sums of at most 100 products of numbers near 1 in float64, in another order
EXACT = 1e-12


def trial_net(method: FunctionMethod, dtype: torch.dtype = torch.float64) -> Net:
    """A model with the row's functions, some steps on, in evaluation."""
    net = Net(dtype).eval()
    attach(method, net)
    return net


def trial_input(dtype: torch.dtype = torch.float64, rows: int = 6) -> Tensor:
    """(rows, 16), the same each time."""
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state dict."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def near(first: Tensor, second: Tensor, what: str, tolerance: float = EXACT) -> None:
    """Raise if two tensors differ by more than a share of the largest element."""
    assert first.shape == second.shape, f"{what}: {list(first.shape)} and {list(second.shape)}"
    if first.numel() == 0:
        return
    error = float((first - second).detach().abs().max())
    limit = tolerance * max(1.0, float(second.detach().abs().max()))
    assert error <= limit, f"{what}: differs by {error:.3g}, more than {limit:.3g}"


def same_state(first: nn.Module, second: nn.Module, what: str, tolerance: float = 0.0) -> None:
    """Raise if two models have other names or values."""
    ours, theirs = state_of(first), state_of(second)
    assert ours.keys() == theirs.keys(), f"{what}: other names: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    for name, value in ours.items():
        near(value.double(), theirs[name].double(), f"{what}: {name}", tolerance)


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a sum of squares; zeros where there are none."""
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def same_gradients(first: dict[str, Tensor], second: dict[str, Tensor], what: str, tolerance: float = EXACT) -> None:
    """Raise if two models have other gradients."""
    assert first.keys() == second.keys(), f"{what}: other parameters"
    for name, value in first.items():
        near(value, second[name], f"{what}: gradient of {name}", tolerance)
