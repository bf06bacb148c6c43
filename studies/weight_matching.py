"""Networks trained apart, averaged: as they are, and after matching by weights, activations and the straight-through loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from studies._harness import SELECTION_SEEDS, Split, cosine, digits, epochs, interval, report, save, train
from torch import Tensor, nn
from torch.nn import functional

from weft.merge import (
    StraightThrough,
    loss_barrier,
    match_activations,
    match_many,
    match_report,
    match_straight_through,
    match_weights,
    reset_batch_norm_,
)
from weft.symmetry import Symmetry, find_symmetry

TRAIN, BATCH, PASSES, STEPS = 1000, 50, 30, 100
RATES = (0.01, 0.1, 0.5)  # of the straight-through estimator; the other methods have nothing to choose
NETWORKS = ("MLP 32", "MLP 256", "CNN 32")
METHODS = ("no matching", "weight matching", "activation matching", "straight-through")
METHOD, BASELINE = "weight matching, MLP 256", "no matching, MLP 256"


def network(name: str) -> nn.Module:
    kind, width = name.split()
    w = int(width)
    if kind == "MLP":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10))
    return nn.Sequential(
        nn.Conv2d(1, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
        nn.Conv2d(w, 2 * w, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
        nn.Conv2d(2 * w, 2 * w, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * w, 10),
    )  # fmt: skip


@cache
def trained(name: str, seed: int, number: int) -> nn.Module:
    """One of several networks on one split, each from its own start and with its own order of the data."""
    torch.manual_seed(100 * seed + number)
    model = network(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    batches = epochs(digits(seed, TRAIN).train, BATCH, PASSES, 100 * seed + number)
    train(model, batches, optimizer, schedule=cosine(PASSES * TRAIN // BATCH))
    return model.eval()


def permuted(name: str, method: str, a: nn.Module, b: nn.Module, symmetry: Symmetry, seed: int) -> nn.Module:
    """B in the order that a method finds."""
    data = digits(seed, TRAIN)
    if method == "no matching":
        return b
    if method == "weight matching":
        found: Any = match_weights(a, b, symmetry, seed=seed)
    elif method == "activation matching":
        found = match_activations(a, b, symmetry, [data.train[0]], seed=seed)
    else:
        found = straight_through(a, b, symmetry, seed, chosen_rate(name))
    return symmetry.apply(copy.deepcopy(b), found.permutations)


def straight_through(a: nn.Module, b: nn.Module, symmetry: Symmetry, seed: int, rate: float) -> StraightThrough:
    batches = epochs(digits(seed, TRAIN).train, TRAIN // 2, STEPS // 2, seed)
    return match_straight_through(a, b, symmetry, batches, functional.cross_entropy, learning_rate=rate, seed=seed)


@cache
def chosen_rate(name: str) -> float:
    """The straight-through estimator's rate with the lowest validation loss of the average, over seeds of their own."""
    totals = dict.fromkeys(RATES, 0.0)
    for seed in SELECTION_SEEDS:
        data = digits(seed, TRAIN)
        judge = Judge(name, data.train, data.validation)
        a, b = trained(name, seed, 0), trained(name, seed, 1)
        symmetry = find_symmetry(a, data.train[0][:3])
        for rate in RATES:
            found = straight_through(a, b, symmetry, seed, rate)
            totals[rate] += judge.loss(_mean([a, symmetry.apply(copy.deepcopy(b), found.permutations)]))
    return min(totals, key=lambda rate: totals[rate])


class Judge:
    """Loss and error in % of state dicts on held-out images, batch norm estimated again from training images."""

    def __init__(self, name: str, train: Split, held_out: Split):
        self.model, self.train, self.held_out = network(name), train, held_out
        self.errors: list[float] = []  # of every call, in order

    @torch.no_grad()
    def loss(self, state: dict[str, Tensor]) -> float:
        self.model.load_state_dict(state)
        reset_batch_norm_(self.model, [self.train[0]])
        outputs = self.model.eval()(self.held_out[0])
        wrong = (outputs.argmax(-1) != self.held_out[1]).float().mean().item()
        self.errors.append(100 * wrong)
        return functional.cross_entropy(outputs, self.held_out[1]).item()

    def error(self, state: dict[str, Tensor]) -> float:
        self.loss(state)
        return self.errors[-1]


def pair(name: str, seed: int) -> dict[str, dict[str, float]]:
    """Of each method: barriers of test loss and error, distance saved, and agreement of singular directions."""
    data = digits(seed, TRAIN)
    a, b = trained(name, seed, 0), trained(name, seed, 1)
    symmetry = find_symmetry(a, data.train[0][:3])
    found = {}
    for method in METHODS:
        aligned = permuted(name, method, a, b, symmetry, seed)
        judge = Judge(name, data.train, data.test)
        after = match_report(a, b, aligned)
        found[method] = {
            "loss barrier": loss_barrier(a, aligned, judge.loss).height,
            "error barrier in %": loss_barrier(a, aligned, _replay(judge.errors)).height,
            "distance reduction in %": 100 * after.distance_reduction,
            **{f"R, gamma {g}": value for g, value in after.alignment_after.items()},
        }
    return found


def _replay(numbers: list[float]) -> Callable[[Any], float]:
    """A loss that was already taken at the same points."""
    rest = iter(list(numbers))
    return lambda state: next(rest)


def three(name: str, seed: int) -> dict[str, float]:
    """Test error in % of the average of three networks, by how they were brought into one order."""
    data = digits(seed, TRAIN)
    models = [trained(name, seed, i) for i in range(3)]
    symmetry = find_symmetry(models[0], data.train[0][:3])
    judge = Judge(name, data.train, data.test)
    ways: dict[str, list[Any]] = {
        "no matching": models,
        "weight matching to the first": _moved(models, symmetry, "first", seed),
        "weight matching to the mean": _moved(models, symmetry, "mean", seed),
        "straight-through to the first": [
            models[0],
            *(permuted(name, "straight-through", models[0], m, symmetry, seed) for m in models[1:]),
        ],
    }
    errors = {way: judge.error(_mean(found)) for way, found in ways.items()}
    single = sum(judge.error(m.state_dict()) for m in models) / 3
    return {"mean of single networks": single, **errors}


def _moved(models: list[nn.Module], symmetry: Symmetry, to: str, seed: int) -> list[nn.Module]:
    permutations = match_many(models, symmetry, to=to, seed=seed)
    return [symmetry.apply(copy.deepcopy(m), p) for m, p in zip(models, permutations)]


def _mean(models: list[nn.Module]) -> dict[str, Tensor]:
    states = [m.state_dict() for m in models]
    return {
        n: torch.stack([s[n] for s in states]).mean(0) if t.is_floating_point() else t for n, t in states[0].items()
    }


def table(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and half of the 95% interval of each entry."""
    return {key: [round(v, 4) for v in interval([row[key] for row in rows])] for key in rows[0]}


def run(seeds: int = 5) -> dict[str, Any]:
    """The study."""
    pairs = {name: [pair(name, seed) for seed in range(seeds)] for name in NETWORKS}
    averages = {name: table([three(name, seed) for seed in range(seeds)]) for name in NETWORKS[1:]}
    values = {
        f"{method}, {name}": [found[method]["loss barrier"] for found in pairs[name]]
        for name in NETWORKS
        for method in METHODS
    }
    result = report(
        paper="weight-matching",
        claim="Matching the units of two networks trained apart by their weights lowers the loss barrier between them.",
        scale=f"digits, {TRAIN} training images, MLPs of 2 hidden layers of 32 and 256, a CNN of 3 convolutions of 32 to 64",
        metric="barrier of the test loss, in nats",
        higher_is_better=False,
        baseline=BASELINE,
        method=METHOD,
        values=values,
        chosen={f"straight-through, {name}": {"learning rate": chosen_rate(name)} for name in NETWORKS},
    )
    details = {
        name: {method: table([found[method] for found in pairs[name]]) for method in METHODS} for name in NETWORKS
    }
    return result | {"diagnostics": details, "test error in % of three averaged": averages}


if __name__ == "__main__":
    save(found := run())
    for key in ("diagnostics", "test error in % of three averaged"):
        for name, rows in found[key].items():
            for method, row in rows.items():
                print(name, method, row)
