"""Adapters of a pretrained encoder against each other: MiniLM-L6, docstrings sorted by package, a head beside each.

All have the same texts, the same batches and the same start; a method's learning rate is chosen on validation, from as
many as each other has, while the head's stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from studies._docstrings import Classifier, splits
from studies._harness import SELECTION_SEEDS, accuracy, compare, cosine, epochs, train
from torch import nn
from torch.optim import AdamW

import weft

BATCH, HEAD_RATE, LAYERS = 16, 3e-2, 6
ENCODER = "encoder.*"


@dataclass(frozen=True)
class Trial:
    """One method.

    Attributes:
        config: of its adapter; None leaves the encoder as it is, and the head is a linear probe.
        rates: learning rates to choose from, of the adapter, or of a probe's head.
        where: names of the linear layers that it changes.
    """

    config: Any
    rates: tuple[float, ...]
    where: str | tuple[str, ...] = ENCODER


def prepare(trial: Trial, rate: float, seed: int, frozen: int) -> tuple[nn.Module, torch.optim.Optimizer, Any, int]:
    """The model, its optimizer, the data, and how many numbers train beside the head."""
    frozen = LAYERS if trial.config is None else frozen
    data = splits(seed, frozen=frozen)
    torch.manual_seed(seed)
    model = Classifier(frozen=frozen)
    head = list(model.classifier.parameters())
    model.encoder.requires_grad_(False)
    groups = [{"params": head, "lr": rate if trial.config is None else HEAD_RATE}]
    if trial.config is not None:
        where = list(trial.where) if isinstance(trial.where, tuple) else trial.where
        weft.adapt_(model, trial.config, where=where, ignore=nn.Embedding, data=data.train[0].split(64))
        for value in head:
            value.requires_grad_(True)
        own = {id(p) for p in head}
        groups.append({"params": [p for p in model.parameters() if p.requires_grad and id(p) not in own], "lr": rate})
    count = sum(p.numel() for g in groups[1:] for p in g["params"])
    return model, AdamW(groups, weight_decay=0.0), data, count


def accuracies(
    trials: Mapping[str, Trial], *, seeds: int, frozen: int, passes: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Test accuracy in percent of each method, with the learning rate that is best for it on validation.

    Args:
        trials: the methods.
        seeds: how many to compare over; each has its own split and batches.
        frozen: how many of the encoder's 6 layers no method changes; their outputs are computed once.
        passes: over the training texts.

    Returns:
        Test accuracies, and the chosen rate with the number of trained values beside the head, by method.
    """

    def measure(setting: tuple[str, float], seed: int) -> tuple[float, float]:
        name, rate = setting
        model, optimizer, data, _ = prepare(trials[name], rate, seed, frozen)
        steps = passes * (len(data.train[0]) // BATCH)
        train(model, epochs(data.train, BATCH, passes, seed), optimizer, schedule=cosine(steps))
        if seed in SELECTION_SEEDS:
            return accuracy(model, data.validation), 0.0
        return 0.0, accuracy(model, data.test)

    settings = {name: [(name, rate) for rate in trial.rates] for name, trial in trials.items()}
    values, chosen = compare(settings, measure, seeds=seeds, higher_is_better=True)
    counts = {name: prepare(trials[name], rate, 0, frozen)[3] for name, rate in chosen.values()}
    return values, {name: {"rate": rate, "parameters": counts[name]} for name, rate in chosen.values()}
