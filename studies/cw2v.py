"""Rows for 200 merges of a character model: learned weighted means against other starts, then continual training.

The baseline is the mean of each token's characters: it costs nothing, needs no text, and is the strongest start that
does not learn. The settings of constrained Word2Vec are weft's defaults, which were set on validation text with a seed of
the selection; the learning rate of continual training is chosen for each start.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from studies._harness import (
    SELECTION_SEEDS,
    VOCABULARY,
    LanguageModel,
    Split,
    compare,
    report,
    save,
    source_text,
    text_batches,
    train,
    windows,
)  # fmt: skip
from torch import Tensor, nn
from torch.nn import functional

from weft.init import extend_vocabulary_, replace_vocabulary_

MERGES, BASE_STEPS, BATCH, LENGTH = 200, 1500, 8, 32
STEPS = (0, 200, 1000)  # of continual training; settings are chosen, and the verdict is taken, at the second
CHARACTERS = 1_000_000  # of the training text that are merged and trained on
RATES = (1e-3, 3e-3, 1e-2)
STRATEGIES = {  # strategy and its options
    "subword mean": ("subword_mean", {}),
    "random": ("mean", {}),  # overwritten by the model's own start, N(0, 0.02)
    "mean": ("mean", {}),
    "multivariate": ("multivariate", {}),
    "CW2V": ("cw2v", {}),
}


def merged(text: Tensor, pair: tuple[int, int], token: int) -> Tensor:
    """A text in which ``token`` stands for each pair, from the left."""
    hits = ((text[:-1] == pair[0]) & (text[1:] == pair[1])).nonzero().flatten()
    if pair[0] == pair[1]:  # every second one of a run
        start = torch.ones(len(hits), dtype=torch.bool)
        start[1:] = hits[1:] != hits[:-1] + 1
        first = torch.where(start, torch.arange(len(hits)), 0).cummax(0).values
        hits = hits[(torch.arange(len(hits)) - first) % 2 == 0]
    text = text.clone()
    text[hits] = token
    kept = torch.ones(len(text), dtype=torch.bool)
    kept[hits + 1] = False
    return text[kept]


@cache
def alphabet() -> list[int]:
    """Characters of the training text; rows of all others would be untrained, and part of every mean."""
    return sorted(set(source_text()[0].tolist()))


@cache
def tokenized() -> tuple[list[list[int]], Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The characters of each merge, characters in each token, and the three texts in tokens."""
    index = torch.full((VOCABULARY,), alphabet().index(ord("?")))
    index[alphabet()] = torch.arange(len(alphabet()))
    texts = [index[text] for text in (source_text()[0][:CHARACTERS], *source_text()[1:])]
    size = len(alphabet()) + MERGES
    spelled = [[i] for i in range(len(alphabet()))]
    for token in range(len(alphabet()), size):
        pair = divmod(int(torch.bincount(texts[0][:-1] * size + texts[0][1:]).argmax()), size)
        texts = [merged(text, pair, token) for text in texts]
        spelled.append(spelled[pair[0]] + spelled[pair[1]])
    return spelled[len(alphabet()) :], torch.tensor([len(s) for s in spelled]), (texts[0], texts[1], texts[2])


@cache
def base(seed: int) -> LanguageModel:
    """A model of the alphabet's characters."""
    torch.manual_seed(seed)
    model = LanguageModel(length=LENGTH)
    train(model, text_batches(seed, BASE_STEPS, BATCH, LENGTH), torch.optim.Adam(model.parameters(), lr=3e-3))
    codes = {chr(code): code for code in range(VOCABULARY)}
    kept = {chr(code): row for row, code in enumerate(alphabet())}
    replace_vocabulary_(model.tokens, codes, kept, head=model.head, strategy="mean", shrink=True)
    return model


def extended(name: str, seed: int) -> LanguageModel:
    """The model with rows for all merges."""
    model = copy.deepcopy(base(seed))
    spelled, _, texts = tokenized()
    strategy, options = STRATEGIES[name]
    generator = torch.Generator().manual_seed(seed)
    done = extend_vocabulary_(
        model.tokens, MERGES, head=model.head, pieces=spelled, text=[texts[0]], strategy=strategy,
        generator=generator, **options,
    )  # fmt: skip
    if name == "random":
        with torch.no_grad():
            for weight in (model.tokens.weight, model.head.weight):
                weight[done.made] = 0.02 * torch.randn(len(done.made), weight.shape[1], generator=generator)
            model.head.bias[done.made] = 0
    return model


@torch.no_grad()
def bits(model: nn.Module, text: Tensor) -> float:
    """Bits a character on 256 windows of tokens; that of guessing a character where worse or NaN."""
    model.eval()
    inputs, labels = windows(text, 256, LENGTH, torch.Generator().manual_seed(7))
    nats = functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten(), reduction="sum").item()
    found = nats / math.log(2) / int(tokenized()[1][labels].sum())
    return found if math.isfinite(found) else math.log2(VOCABULARY)


def batches(seed: int, steps: int) -> Iterator[Split]:
    """Windows of the training text in tokens."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield windows(tokenized()[2][0], BATCH, LENGTH, generator)


@cache
def curve(name: str, rate: float, seed: int) -> list[tuple[float, float]]:
    """Validation and test bits after each number of steps."""
    model = extended(name, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    last = STEPS[1] if seed in SELECTION_SEEDS else STEPS[-1]
    scores, done = [], 0
    data = batches(seed, last)
    for steps in (s for s in STEPS if s <= last):
        train(model, (next(data) for _ in range(steps - done)), optimizer)
        done = steps
        scores.append((bits(model, tokenized()[2][1]), bits(model, tokenized()[2][2])))
    return scores


def measure(setting: tuple[str, float], seed: int) -> tuple[float, float]:
    return curve(*setting, seed)[1]


def run(seeds: int = 5) -> dict[str, Any]:
    """The study."""
    candidates = {name: [(name, rate) for rate in RATES] for name in STRATEGIES}
    _, chosen = compare(candidates, measure, seeds=seeds, higher_is_better=False)
    results = []
    for place, steps in enumerate(STEPS):
        results.append(
            report(
                paper="cw2v",
                claim=f"After {STEPS[1]} continual steps, rows that constrained Word2Vec learned lose less than means of pieces.",
                scale=f"standard library source, character model (2 layers of width 64) given {MERGES} merges, "
                f"{BATCH * LENGTH} tokens a step, Adam",
                metric="test loss in bits a byte after continual steps (differences: at as many steps)",
                higher_is_better=False,
                baseline=f"subword mean, {steps} steps",
                method=f"CW2V, {steps} steps",
                values={
                    f"{n}, {steps} steps": [curve(*chosen[n], s)[place][1] for s in range(seeds)] for n in STRATEGIES
                },
                chosen={f"{name}, {steps} steps": {"rate": rate} for name, (_, rate) in chosen.items()},
            )
        )
    return results[1] | {"table": [row for result in results for row in result["table"]]}


if __name__ == "__main__":
    save(run())
