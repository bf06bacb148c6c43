"""Weight standardisation with group norm against group norm alone, at two images a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from studies._harness import accuracy, compare, cosine, digits, epochs, report, save, train
from torch import Tensor, nn

import weft
from weft.normalize import BatchChannelNorm2d, WeightStandardization

TRAIN, BATCH, PASSES, WIDTH, GROUPS = 400, 2, 3, 16, 4
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
Norm = Callable[[int], nn.Module]


class Residual(nn.Module):
    """x + conv norm relu conv norm."""

    def __init__(self, norm: Norm):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), norm(WIDTH), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), norm(WIDTH),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


def network(norm: Norm, standardized: bool) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), norm(WIDTH), nn.ReLU(), *(Residual(norm) for _ in range(3)),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * WIDTH, 10),
    )  # fmt: skip
    if standardized:
        weft.parametrize_(model, WeightStandardization(), where=nn.Conv2d)
    return model


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, width)


def batch_channel(width: int) -> nn.Module:
    return BatchChannelNorm2d(width, groups=GROUPS, estimate=True)


METHODS: dict[str, tuple[Norm, bool]] = {
    "GN": (group_norm, False),
    "WS + GN": (group_norm, True),
    "WS + BCN with estimates": (batch_channel, True),
    "BN": (nn.BatchNorm2d, False),
}


def measure(setting: tuple[str, float], seed: int) -> tuple[float, float]:
    name, rate = setting
    data = digits(seed, TRAIN)
    torch.manual_seed(seed)
    model = network(*METHODS[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    train(model, epochs(data.train, BATCH, PASSES, seed), optimizer, schedule=cosine(PASSES * TRAIN // BATCH))
    return accuracy(model, data.validation), accuracy(model, data.test)


def run(seeds: int = 5) -> dict[str, Any]:
    """The study."""
    candidates = {name: [(name, rate) for rate in RATES] for name in METHODS}
    values, chosen = compare(candidates, measure, seeds=seeds, higher_is_better=True)
    return report(
        paper="weight-standardization",
        claim="At two images a batch, weight standardisation with group norm beats group norm alone.",
        scale=f"digits, {TRAIN} training images, residual network of 7 convolutions, {PASSES} passes",
        metric="test accuracy in %",
        higher_is_better=True,
        baseline="GN",
        method="WS + GN",
        values=values,
        chosen={name: {"rate": rate} for name, rate in chosen.values()},
    )


if __name__ == "__main__":
    save(run())
