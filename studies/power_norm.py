"""PowerNorm against layer norm in a small language model, batch norm beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from studies._harness import LanguageModel, compare, cosine, report, save, text_batches, text_losses, train
from torch import Tensor, nn

from weft.normalize import PowerNorm

STEPS, BATCH, LENGTH = 250, 16, 64
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over all tokens of the batch, (batch, length, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


METHODS: dict[str, Callable[[int], nn.Module]] = {
    "LN": nn.LayerNorm,
    "PN": lambda width: PowerNorm(width, warmup=50),
    "BN": TokenBatchNorm,
}


def measure(setting: tuple[str, float], seed: int) -> tuple[float, float]:
    name, rate = setting
    torch.manual_seed(seed)
    model = LanguageModel(METHODS[name], length=LENGTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    train(model, text_batches(seed, STEPS, BATCH, LENGTH), optimizer, schedule=cosine(STEPS))
    return text_losses(model, length=LENGTH)


def run(seeds: int = 5) -> dict[str, Any]:
    """The study."""
    candidates = {name: [(name, rate) for rate in RATES] for name in METHODS}
    values, chosen = compare(candidates, measure, seeds=seeds, higher_is_better=False)
    return report(
        paper="power-norm",
        claim="In a language model, PowerNorm reaches a lower loss than layer norm.",
        scale=f"standard library source, 2 layers of width 64, {STEPS} steps of {BATCH * LENGTH} characters, Adam",
        metric="test loss in nats a character",
        higher_is_better=False,
        baseline="LN",
        method="PN",
        values=values,
        chosen={name: {"rate": rate} for name, rate in chosen.values()},
    )


if __name__ == "__main__":
    save(run())
