"""Small networks, each with a symmetry of its own, and the check that a symmetry is true."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.symmetry import Symmetry


class GatedMLP(nn.Module):
    """Gate and up in one matrix, cut by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(5, 2 * 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.short: nn.Module = nn.Identity()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.short(x))


class ResNet(nn.Module):
    """Two stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.stage1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.stage2 = nn.Sequential(Block(8, 12, 2), Block(12, 12, 1))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(functional.max_pool2d(functional.relu(self.norm(self.stem(x))), 2)))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Grouped(nn.Module):
    """Grouped, depthwise and transposed convolutions with group normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 20, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(4, 20)
        self.point = nn.Conv2d(20, 6, 1)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(12, 7, 2, 2)
        self.last = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.grouped(functional.relu(self.first(x)))))
        return self.last(functional.relu(self.up(functional.relu(self.depthwise(functional.relu(self.point(x)))))))


class Attention(nn.Module):
    """Fused attention, with or without rotary positions: how the projection is cut is chosen by name."""

    def __init__(self, cut: str = "split", rotary: bool = False, width: int = 24, heads: int = 3):
        super().__init__()
        self.cut, self.rotary, self.heads = cut, rotary, heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        y = self.qkv(self.norm(x))
        if self.cut == "unbind":
            q, k, v = y.reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.cut == "interleaved":  # heads outside, as BLOOM
            y = y.view(b, t, self.heads, 3, -1)
            q, k, v = (y[:, :, :, i].transpose(1, 2) for i in range(3))
        else:
            q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in y.split(width, dim=-1))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width)
        return x + self.out(y)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions in halves."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[-2]), 100.0 ** (-torch.arange(half) / half))
    cos, sin = torch.cat([angle.cos()] * 2, -1).to(x.dtype), torch.cat([angle.sin()] * 2, -1).to(x.dtype)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, evaluation, every tensor random: nothing is equal by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
        for name, tensor in model.named_buffers():
            if "running" in name or "bias" in name:
                tensor.add_(0.5 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    """The first output."""
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out[0]


def roll(symmetry: Symmetry, name: str) -> dict[str, np.ndarray]:
    """A permutation without fixed places, another one in each unit around."""
    shape = symmetry.shape(name)
    rows = [np.roll(np.arange(shape[-1]), 1 + i % (shape[-1] - 1)) for i in range(int(np.prod(shape[:-1])))]
    return {name: np.stack(rows).reshape(shape)}


def check(model: nn.Module, symmetry: Symmetry, inputs: Any, tolerance: float = 1e-9) -> None:
    """Every group alone, and all together, change every tensor that they name, and not the function."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = outputs(model, inputs)
    assert symmetry.groups
    every = symmetry.random(torch.Generator().manual_seed(5))
    trials = [(g.tensors, roll(symmetry, g.name)) for g in symmetry.groups] + [((), every)]
    for tensors, permutations in trials:
        moved = symmetry.apply(state, permutations)
        for name in tensors:
            assert not torch.equal(moved[name], state[name]), f"{permutations.keys()} leaves {name} as it is"
        for name, tensor in moved.items():
            known = symmetry.aliases.get(name, name)
            assert known in tensors or not tensors or tensor is state[name], f"{permutations.keys()} moves {name}"
        model.load_state_dict(moved)
        error = (outputs(model, inputs) - before).abs().max().item()
        assert error < tolerance * max(1.0, before.abs().max().item()), f"{[*permutations]}: {error}"
    model.load_state_dict(state)
