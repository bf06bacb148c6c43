"""Weight compander in addition to weight decay against weight decay alone, few and partly wrong labels."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from studies._harness import Split, accuracy, compare, cosine, digits, epochs, report, save, train
from torch import nn

import weft
from weft.normalize import WeightCompander

TRAIN, WRONG, BATCH, PASSES, WIDTH = 200, 0.2, 20, 40, 128
RATES, DECAYS, EXPANSIONS = (0.003, 0.01, 0.03, 0.1), (0.0, 3e-3, 1e-2, 3e-2, 0.1), (1.0, 2.0)
METHODS = {
    "plain": [None],
    "compander, fixed": [WeightCompander(expansion=e, learn=False) for e in EXPANSIONS],
    "compander, learned": [WeightCompander(expansion=e) for e in EXPANSIONS],
}


def wrong_labels(data: Split, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = data[1].clone()
    chosen = torch.rand(len(labels), generator=generator) < WRONG
    labels[chosen] = torch.randint(10, (int(chosen.sum()),), generator=generator)
    return data[0], labels


def measure(setting: tuple[WeightCompander | None, float, float], seed: int) -> tuple[float, float]:
    config, rate, decay = setting
    data = digits(seed, TRAIN)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )
    if config is not None:
        weft.parametrize_(model, config)
    own = [p for n, p in model.named_parameters() if n.endswith(("log_a", "log_b"))]
    rest = [p for n, p in model.named_parameters() if not n.endswith(("log_a", "log_b"))]
    groups = [{"params": rest, "weight_decay": decay}, *([{"params": own, "lr": 0.1 * rate}] if own else [])]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    batches = epochs(wrong_labels(data.train, seed), BATCH, PASSES, seed)
    train(model, batches, optimizer, schedule=cosine(PASSES * TRAIN // BATCH))
    return accuracy(model, data.validation), accuracy(model, data.test)


def run(seeds: int = 10) -> dict[str, Any]:
    """The study."""
    candidates = {name: list(itertools.product(configs, RATES, DECAYS)) for name, configs in METHODS.items()}
    values, chosen = compare(candidates, measure, seeds=seeds, higher_is_better=True)
    shown = {
        name: {"rate": rate, "weight_decay": decay} | ({} if config is None else {"expansion": config.expansion})
        for name, (config, rate, decay) in chosen.items()
    }
    return report(
        paper="weight-compander",
        claim="In addition to weight decay, companded weights generalise better than weight decay alone.",
        scale=f"digits, {TRAIN} training images with {WRONG:.0%} random labels, MLP of 2 hidden layers",
        metric="test accuracy in %",
        higher_is_better=True,
        baseline="plain",
        method="compander, learned",
        values=values,
        chosen=shown,
    )


if __name__ == "__main__":
    save(run())
