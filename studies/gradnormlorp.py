"""GradNormLoRP and GaLore against LoRA, with as many numbers kept beside the pretrained weights; all weights beside them.

What is counted for each matrix is what has to stay from step to step: for LoRA the factors and their moments, for the
others moments, bases and lengths. Each matrix gets the highest rank that LoRA's count allows. All methods train the
matrices of the last layer and the head, in passes over the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from studies._docstrings import Classifier, splits
from studies._harness import SELECTION_SEEDS, accuracy, compare, cosine, epochs, report, save, train
from torch import nn
from torch.optim import AdamW, Optimizer

import weft
from weft.adapt import LoRA, LowRankProjectedAdamW, projected_state_size

FROZEN, BATCH, PASSES, HEAD_RATE = 5, 16, 1, 1e-2
RANK, SCALE, GAP = 4, 4.0, 25  # LoRA's rank; scale and rank as the paper has them for GLUE; steps from basis to basis
BODY = "encoder.encoder.*"


def budget(shape: tuple[int, ...]) -> int:
    """Numbers that LoRA keeps for a matrix: two factors and two moments of each."""
    return 3 * RANK * sum(shape)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith("classifier")]


def lora(model: nn.Module, rate: float) -> Optimizer:
    weft.parametrize_(model, LoRA(rank=RANK, alpha=4.0 * RANK), where=nn.Linear, ignore="classifier")
    factors = [p for f in weft.functions(model).values() for p in f[0].parameters()]
    return AdamW([{"params": factors, "lr": rate}, head(model)], weight_decay=0.0)


def projected(**options: Any) -> Callable[[nn.Module, float], Optimizer]:
    def build(model: nn.Module, rate: float) -> Optimizer:
        groups = [{"params": [p], "rank": rank_for((p.shape[0], p.shape[1]), options)} for p in matrices(model)]
        return LowRankProjectedAdamW([*groups, head(model)], rate, scale=SCALE, update_proj_gap=GAP, **options)

    return build


def rank_for(shape: tuple[int, int], options: dict[str, str]) -> int:
    """The highest rank within LoRA's budget."""
    return max(r for r in range(1, min(shape)) if projected_state_size(shape, r, **options) <= budget(shape))


def full(model: nn.Module, rate: float) -> Optimizer:
    return AdamW([{"params": matrices(model), "lr": rate}, head(model)], weight_decay=0.0)


def head(model: nn.Module) -> dict[str, Any]:
    return {"params": list(model.classifier.parameters()), "lr": HEAD_RATE}


METHODS: dict[str, tuple[Callable[[nn.Module, float], Optimizer], tuple[float, ...]]] = {
    "LoRA": (lora, (3e-4, 1e-3, 3e-3)),
    "GaLore": (projected(), (3e-4, 1e-3, 3e-3)),
    "GradNormLoRP": (projected(normalize="weight", projection="both"), (1e-3, 3e-3, 1e-2)),
    "GradNormLoRP, one-sided": (projected(normalize="weight"), (3e-4, 1e-3, 3e-3)),
    "AdamW on all weights": (full, (1e-4, 3e-4, 1e-3)),
}


def measure(setting: tuple[str, float], seed: int) -> tuple[float, float]:
    name, rate = setting
    data = splits(seed, frozen=FROZEN)
    torch.manual_seed(seed)
    model = Classifier(frozen=FROZEN)
    model.encoder.requires_grad_(False)
    for weight in matrices(model):
        weight.requires_grad_(True)
    optimizer, steps = METHODS[name][0](model, rate), PASSES * (len(data.train[0]) // BATCH)
    train(model, epochs(data.train, BATCH, PASSES, seed), optimizer, schedule=cosine(steps))
    return (accuracy(model, data.validation), 0.0) if seed in SELECTION_SEEDS else (0.0, accuracy(model, data.test))


def numbers_kept() -> dict[str, int]:
    """What each method keeps beside the pretrained matrices from step to step, the head aside."""
    shapes = [(p.shape[0], p.shape[1]) for p in matrices(Classifier(frozen=FROZEN))]
    both, one = {"normalize": "weight", "projection": "both"}, {"normalize": "weight"}
    kept = {
        name: sum(projected_state_size(s, rank_for(s, options), **options) for s in shapes)
        for name, options in {"GaLore": {}, "GradNormLoRP": both, "GradNormLoRP, one-sided": one}.items()
    }
    return kept | {"LoRA": sum(map(budget, shapes)), "AdamW on all weights": sum(2 * m * n for m, n in shapes)}


def run(seeds: int = 5) -> dict[str, Any]:
    """The study."""
    candidates = {name: [(name, rate) for rate in rates] for name, (_, rates) in METHODS.items()}
    values, chosen = compare(candidates, measure, seeds=seeds, higher_is_better=True)
    kept = numbers_kept()
    return report(
        paper="gradnormlorp",
        claim="With as many numbers kept beside the pretrained weights, GradNormLoRP fine-tunes better than LoRA.",
        scale=f"docstrings by package, 10 classes, last layer of MiniLM-L6, {PASSES} pass of {BATCH} texts a step",
        metric="test accuracy in %",
        higher_is_better=True,
        baseline="LoRA",
        method="GradNormLoRP",
        values=values,
        chosen={name: {"rate": rate, "numbers kept": kept[name]} for name, rate in chosen.values()},
    )


if __name__ == "__main__":
    save(run())
