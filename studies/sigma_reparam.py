"""σReparam against plain weights in a small language model, without warm-up, at ten times the best learning rate."""

from __future__ import annotations

from typing import Any

import torch
from studies._harness import LanguageModel, compare, report, save, text_batches, text_losses, train

import weft
from weft.normalize import SigmaReparam

STEPS, BATCH, LENGTH, RAISE = 200, 8, 64, 10
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def measure(setting: tuple[bool, float], seed: int) -> tuple[float, float]:
    reparametrized, rate = setting
    torch.manual_seed(seed)
    model = LanguageModel(layers=3, length=LENGTH)
    if reparametrized:
        weft.parametrize_(model, SigmaReparam(), where="all-linear")
    train(model, text_batches(seed, STEPS, BATCH, LENGTH), torch.optim.Adam(model.parameters(), lr=rate))
    return text_losses(model, length=LENGTH)


def run(seeds: int = 5) -> dict[str, Any]:
    """The study."""
    methods = {"plain, own best": False, "σReparam, own best": True}
    candidates = {name: [(reparametrized, rate) for rate in RATES] for name, reparametrized in methods.items()}
    own, best = compare(candidates, measure, seeds=seeds, higher_is_better=False)
    raised = RAISE * best["plain, own best"][1]
    given = {"plain, raised": [(False, raised)], "σReparam, raised": [(True, raised)]}
    values, chosen = compare(given, measure, seeds=seeds, higher_is_better=False)
    return report(
        paper="sigma-reparam",
        claim=f"Without warm-up, at {RAISE} times the learning rate that is best for plain weights, σReparam loses less.",
        scale=f"standard library source, 3 layers of width 64, {STEPS} steps of {BATCH * LENGTH} characters, Adam",
        metric="test loss in nats a character",
        higher_is_better=False,
        baseline="plain, raised",
        method="σReparam, raised",
        values=values | own,
        chosen={name: {"rate": rate} for name, (_, rate) in (chosen | best).items()},
    )


if __name__ == "__main__":
    save(run())
