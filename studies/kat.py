"""GR-KAN against a GELU MLP of as many parameters, on digits."""

from __future__ import annotations

import time
from typing import Any

import torch
from studies._harness import SELECTION_SEEDS, accuracy, compare, cosine, digits, epochs, report, save, train
from torch import Tensor, nn

from weft.init import GRKAN, GroupRational

TRAIN, BATCH, PASSES, WIDTH, BLOCKS = 500, 50, 20, 64, 2
RATES = (1e-3, 3e-3, 1e-2)
HIDDEN = 128
METHODS = ("GELU MLP", "GR-KAN", "GR-KAN, functions fixed", "GR-KAN, truncated normal start")
Setting = tuple[str, float]


class Block(nn.Module):
    """A norm and an MLP beside a shortcut, as in a transformer."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) -> the same shape."""
        return x + self.mlp(self.norm(x))


def build(name: str) -> nn.Module:
    def mlp() -> nn.Module:
        if name == "GELU MLP":  # one hidden unit more has more parameters than the functions of a GR-KAN
            return nn.Sequential(nn.Linear(WIDTH, HIDDEN + 1), nn.GELU(), nn.Linear(HIDDEN + 1, WIDTH))
        made = GRKAN(WIDTH, HIDDEN)
        for module in made.modules():
            if isinstance(module, GroupRational) and name == "GR-KAN, functions fixed":
                module.requires_grad_(False)
            if isinstance(module, nn.Linear) and name == "GR-KAN, truncated normal start":
                nn.init.trunc_normal_(module.weight, std=0.02)
        return made

    head = nn.Linear(WIDTH, 10)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, WIDTH), *(Block(mlp()) for _ in range(BLOCKS)), nn.LayerNorm(WIDTH), head
    )


SECONDS: dict[str, list[float]] = {}


def measure(setting: Setting, seed: int) -> tuple[float, float]:
    name, rate = setting
    data = digits(seed, TRAIN)
    torch.manual_seed(seed)
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    begun = time.process_time()
    train(model, epochs(data.train, BATCH, PASSES, seed), optimizer, schedule=cosine(PASSES * TRAIN // BATCH))
    if seed not in SELECTION_SEEDS:
        SECONDS.setdefault(name, []).append((time.process_time() - begun) / PASSES)
    return accuracy(model, data.validation), accuracy(model, data.test)


def run(seeds: int = 10) -> dict[str, Any]:
    """The study."""
    candidates = {name: [(name, rate) for rate in RATES] for name in METHODS}
    values, chosen = compare(candidates, measure, seeds=seeds, higher_is_better=True)
    result = report(
        paper="kat",
        claim="At equal parameters and steps, MLPs with learned rational activations classify better than with GELU.",
        scale=f"digits, {TRAIN} training images, {BLOCKS} residual blocks of width {WIDTH}, {PASSES} passes",
        metric="test accuracy in %",
        higher_is_better=True,
        baseline="GELU MLP",
        method="GR-KAN",
        values=values,
        chosen={name: {"rate": rate} for name, rate in chosen.values()},
    )
    return result | {"cpu_seconds_per_pass": {n: round(sum(v) / len(v), 4) for n, v in SECONDS.items()}}


if __name__ == "__main__":
    save(run())
