"""Ghost batch norm against batch norm at a large batch, with the small batch beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from studies._harness import accuracy, compare, cosine, digits, epochs, report, save, train
from torch import nn

from weft.normalize import GhostBatchNorm1d, adapt_regime, scale_learning_rate

TRAIN, LARGE, SMALL, PASSES, WIDTH = 512, 512, 32, 40, 128
RATES = (0.01, 0.03, 0.1, 0.3)  # at the small batch; the large one has them times the root of the ratio
Norm = Callable[[int], nn.Module]


def ghost(width: int) -> nn.Module:
    return GhostBatchNorm1d(width, ghost_size=SMALL)


LONG = adapt_regime((), PASSES, LARGE, SMALL)[1]
METHODS: dict[str, tuple[Norm, int, int]] = {  # norm, batch, passes
    "BN, batch 512": (nn.BatchNorm1d, LARGE, PASSES),
    "ghost BN, batch 512": (ghost, LARGE, PASSES),
    "ghost BN, batch 512, as many steps": (ghost, LARGE, LONG),
    "BN, batch 512, as many steps": (nn.BatchNorm1d, LARGE, LONG),
    "BN, batch 32": (nn.BatchNorm1d, SMALL, PASSES),
}


def measure(setting: tuple[str, float], seed: int) -> tuple[float, float]:
    name, rate = setting
    norm, batch, passes = METHODS[name]
    data = digits(seed, TRAIN)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, WIDTH), norm(WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, WIDTH), norm(WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=scale_learning_rate(rate, batch, SMALL), momentum=0.9)
    steps = passes * TRAIN // batch

    def clip() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)

    train(model, epochs(data.train, batch, passes, seed), optimizer, schedule=cosine(steps), before_step=clip)
    return accuracy(model, data.validation), accuracy(model, data.test)


def run(seeds: int = 10) -> dict[str, Any]:
    """The study."""
    candidates = {name: [(name, rate) for rate in RATES] for name in METHODS}
    values, chosen = compare(candidates, measure, seeds=seeds, higher_is_better=True)
    return report(
        paper="ghost-batch-norm",
        claim="At a large batch and equal passes over the data, ghost batch norm generalises better than batch norm.",
        scale=f"digits, {TRAIN} training images, MLP of 2 hidden layers, {PASSES} passes",
        metric="test accuracy in %",
        higher_is_better=True,
        baseline="BN, batch 512",
        method="ghost BN, batch 512",
        values=values,
        chosen={name: {"rate at batch 32": rate} for name, rate in chosen.values()},
    )


if __name__ == "__main__":
    save(run())
