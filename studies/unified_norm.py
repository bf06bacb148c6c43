"""Unified normalisation against layer norm in a small language model; UN's losses are those of the fused model.

The paper leaves its outlier filter off for text, and so does the row that is compared; the row with the filter stands
beside it, with its own learning rate chosen on validation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from studies._harness import LanguageModel, compare, cosine, report, save, text_batches, text_losses, train
from torch import nn

from weft.normalize import UnifiedNorm

STEPS, BATCH, LENGTH = 250, 16, 64
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
METHODS: dict[str, Callable[[int], nn.Module]] = {
    "LN": nn.LayerNorm,
    "UN": lambda width: UnifiedNorm(width, warmup=50, outlier_filter=False),
    "UN, outliers filtered": lambda width: UnifiedNorm(width, warmup=50),
}


def fuse(model: LanguageModel) -> None:
    """Fold every norm into the layer that reads it."""
    model.eval()
    for block in model.blocks:
        block["norm_attention"] = block["norm_attention"].fuse_(block["qkv"])
        block["norm_mlp"] = block["norm_mlp"].fuse_(block["up"])
    model.norm = model.norm.fuse_(model.head)


def measure(setting: tuple[str, float], seed: int) -> tuple[float, float]:
    name, rate = setting
    torch.manual_seed(seed)
    model = LanguageModel(METHODS[name], length=LENGTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    train(model, text_batches(seed, STEPS, BATCH, LENGTH), optimizer, schedule=cosine(STEPS))
    if name != "LN":
        fuse(model)
    return text_losses(model, length=LENGTH)


def run(seeds: int = 5) -> dict[str, Any]:
    """The study."""
    candidates = {name: [(name, rate) for rate in RATES] for name in METHODS}
    values, chosen = compare(candidates, measure, seeds=seeds, higher_is_better=False)
    return report(
        paper="unified-norm",
        claim="In a language model, unified normalisation reaches a lower loss than layer norm.",
        scale=f"standard library source, 2 layers of width 64, {STEPS} steps of {BATCH * LENGTH} characters, Adam",
        metric="test loss in nats a character",
        higher_is_better=False,
        baseline="LN",
        method="UN",
        values=values,
        chosen={name: {"rate": rate} for name, rate in chosen.values()},
    )


if __name__ == "__main__":
    save(run())
