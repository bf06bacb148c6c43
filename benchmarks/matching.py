"""What weight matching costs: seconds in total and in the assignment solver, for two networks of one shape.

python benchmarks/matching.py     writes benchmarks/results/matching.json; a minute on one core

ResNet-18 has 11 million parameters and groups of 64 to 512 channels; MiniLM-L6 has 22 million and, in each of 6 layers, 12
heads whose 144 pairs are matched inside. Both are matched with a second start, drawn at random like the first, and with
a copy of themselves in a random order, which must come back whole. The fastest of some repeats is given: a shared
machine only ever adds to it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import weft
from weft.merge import match_weights
from weft.symmetry import find_symmetry

RESULTS = Path(__file__).with_name("results") / "matching.json"


class Residual(nn.Module):
    """Two convolutions and a short cut."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        short = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.short = nn.Identity() if width == out and stride == 1 else short

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(inside + self.short(x))


class ResNet18(nn.Module):
    """Stages of 64, 128, 256 and 512 channels, two blocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(64)
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        self.layers = nn.Sequential(*(Residual(a, b, 2 if a != b else 1) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.conv(x))), 3, 2, 1)
        return self.head(self.layers(x).mean((2, 3)))


def mini_lm() -> nn.Module:
    """The shape of all-MiniLM-L6."""
    import transformers

    return transformers.BertModel(
        transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
        )
    )


SHAPES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "ResNet-18": (ResNet18, torch.zeros(2, 3, 64, 64)),
    "MiniLM-L6": (mini_lm, None),
}


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Both pairs of one shape."""
    build, inputs = SHAPES[name]
    torch.manual_seed(0)
    model, other = build().eval(), build().eval()
    began = time.perf_counter()
    symmetry = find_symmetry(model, inputs)
    tracing = time.perf_counter() - began
    planted = symmetry.random(np.random.default_rng(0))
    states = {"another start": other.state_dict(), "itself, permuted": symmetry.apply(model.state_dict(), planted)}
    rows: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(symmetry.groups),
        "seconds to find the groups": round(tracing, 2),
    }
    for pair, state in states.items():
        cpu, runs = [], []
        for _ in range(repeats):
            began = time.process_time()
            runs.append(match_weights(model, state, symmetry))
            cpu.append(time.process_time() - began)
        least = min(runs, key=lambda run: run.seconds)
        rows[pair] = {
            "seconds": round(least.seconds, 2),
            "CPU seconds": round(min(cpu), 2),
            "share of the assignment solver": round(least.assignment_seconds / least.seconds, 3),
            "assignments": least.assignments,
            "sweeps": least.sweeps,
        }
        if pair != "another start":
            inverse = symmetry.invert(planted)
            rows[pair]["recovered"] = all((least.permutations[n] == inverse[n]).all() for n in inverse)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, weft {weft.__version__}",
        "repeats": options.repeats,
        **{name: measure(name, options.repeats) for name in SHAPES},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
