"""What the studies share: real data, one training loop, a small language model, paired intervals, verdicts, results.

A study compares methods over seeds. Every seed gives all methods the same data and the same start, so differences are
paired. Hyper-parameters are chosen on a validation split with seeds that the comparison does not use. From the checkout's root,
``python -m studies.NAME`` runs a study and writes ``studies/results/PAPER.json``; ``weft study PAPER`` only shows it.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

RESULTS = Path(__file__).with_name("results")
SELECTION_SEEDS = (1000, 1001)  # never used for a comparison
VOCABULARY = 128
Split = tuple[Tensor, Tensor]
Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, (n, 1, 8, 8) in [0, 1], in three parts."""

    train: Split
    validation: Split
    test: Split


def digits(seed: int, train: int) -> Digits:
    """A random split of scikit-learn's 1797 digits: ``train`` for training, 300 for validation, the rest for test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = torch.tensor(data.images[order], dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target[order])
    parts = [slice(300, 300 + train), slice(0, 300), slice(300 + train, None)]
    return Digits(*((images[p], labels[p]) for p in parts))


@cache
def source_text() -> tuple[Tensor, Tensor, Tensor]:
    """The standard library's own modules as characters (codes below 128), whole files in training, validation, test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts: list[list[bytes]] = [[], [], []]
    for index, file in enumerate(files):
        parts[{8: 1, 9: 2}.get(index % 10, 0)].append(file.read_bytes())
    joined = [np.frombuffer(b"\n".join(p), np.uint8) for p in parts]
    train, validation, test = (torch.from_numpy(np.where(t < VOCABULARY, t, 63).astype(np.int64)) for t in joined)
    return train, validation, test


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Split:
    """Random windows of a text: characters (count, length), and those that follow each."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    index = starts + torch.arange(length + 1)
    return text[index[:, :-1]], text[index[:, 1:]]


def text_batches(seed: int, steps: int, count: int, length: int) -> Iterator[Split]:
    """Random windows of the training text."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield windows(source_text()[0], count, length, generator)


class LanguageModel(nn.Module):
    """A causal transformer over characters, norms in front of each branch."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        length: int = 64,
    ):
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_attention": norm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm_mlp": norm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.norm = norm(width)
        self.head = nn.Linear(width, VOCABULARY)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, vocabulary)."""
        x = self.tokens(characters) + self.positions.weight[: characters.shape[1]]
        for block in self.blocks:
            heads = block["qkv"](block["norm_attention"](x)).unflatten(-1, (3, self.heads, -1))
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](mixed.transpose(1, 2).flatten(2))
            x = x + block["down"](functional.gelu(block["up"](block["norm_mlp"](x))))
        return self.head(self.norm(x))


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over all but the last axis of the outputs."""
    return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def train(
    model: nn.Module,
    batches: Iterable[Split],
    optimizer: torch.optim.Optimizer,
    *,
    loss_function: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    schedule: Callable[[int], float] | None = None,
    before_step: Callable[[], Any] | None = None,
) -> None:
    """One step of a loss a batch; ``schedule(step)`` multiplies the learning rate. Stops at a loss of NaN."""
    rates = [g["lr"] for g in optimizer.param_groups]
    model.train()
    for step, (inputs, labels) in enumerate(batches):
        if schedule is not None:
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * schedule(step)
        loss = loss_function(model(inputs), labels)
        if not math.isfinite(loss.item()):
            return
        optimizer.zero_grad()
        loss.backward()
        if before_step is not None:
            before_step()
        optimizer.step()


def cosine(steps: int) -> Callable[[int], float]:
    """A learning rate that falls to zero as a cosine, without warm-up."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))


def epochs(data: Split, batch: int, count: int, seed: int) -> Iterator[Split]:
    """Shuffled batches of so many passes; what does not fill a batch is left out of its pass."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        order = torch.randperm(len(data[0]), generator=generator)
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            yield data[0][chosen], data[1][chosen]


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Share of right answers in percent."""
    model.eval()
    return 100 * (model(data[0]).argmax(-1) == data[1]).float().mean().item()


@torch.no_grad()
def text_losses(model: nn.Module, *, length: int = 64) -> tuple[float, float]:
    """Validation and test loss in nats a character over 256 fixed windows; that of guessing where worse or NaN."""
    model.eval()
    losses = []
    for text in source_text()[1:]:
        inputs, labels = windows(text, 256, length, torch.Generator().manual_seed(7))
        loss = functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).item()
        losses.append(min(loss, math.log(VOCABULARY)) if math.isfinite(loss) else math.log(VOCABULARY))
    return losses[0], losses[1]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95% t-interval."""
    from scipy.stats import t

    array = np.asarray(values, float)
    if len(array) < 2:
        return float(array.mean()), math.inf
    return float(array.mean()), float(t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))


def verdict(method: Sequence[float], baseline: Sequence[float], *, higher_is_better: bool) -> str:
    """Decided by whether the 95% interval of the paired differences excludes zero."""
    sign = 1 if higher_is_better else -1
    mean, half = interval([sign * (m - b) for m, b in zip(method, baseline, strict=True)])
    if mean - half > 0:
        return "holds"
    return "does not hold here" if mean + half < 0 else "inconclusive"


def compare(
    candidates: Mapping[str, Sequence[Setting]],
    measure: Callable[[Setting, int], tuple[float, float]],
    *,
    seeds: int,
    higher_is_better: bool,
) -> tuple[dict[str, list[float]], dict[str, Setting]]:
    """Test scores of each method with the setting that is best for it on validation.

    Args:
        candidates: settings to choose from, by method.
        measure: (setting, seed) -> (validation score, test score).
        seeds: how many seeds to compare over.
        higher_is_better: whether larger scores are better.

    Returns:
        Test scores and the chosen setting, by method.
    """
    sign = 1 if higher_is_better else -1

    def validation(setting: Setting) -> float:
        return sign * sum(measure(setting, seed)[0] for seed in SELECTION_SEEDS)

    chosen = {name: max(settings, key=validation) for name, settings in candidates.items()}
    return {name: [measure(s, seed)[1] for seed in range(seeds)] for name, s in chosen.items()}, chosen


def report(
    *,
    paper: str,
    claim: str,
    scale: str,
    metric: str,
    higher_is_better: bool,
    baseline: str,
    method: str,
    values: dict[str, list[float]],
    chosen: dict[str, Any],
) -> dict[str, Any]:
    """The result of a study, as ``results/`` keeps it.

    Args:
        paper: key of its card.
        claim: what was tested, in a sentence.
        scale: data and model, in words.
        metric: what ``values`` are, with unit.
        higher_is_better: whether larger values are better.
        baseline, method: the two names in ``values`` that the verdict compares.
        values: one number a seed for each method.
        chosen: hyper-parameters chosen on validation, by method.
    """
    table = []
    for name, numbers in values.items():
        mean, half = interval(numbers)
        difference, spread = interval([n - b for n, b in zip(numbers, values[baseline], strict=True)])
        row: dict[str, Any] = {"method": name, "mean": round(mean, 4), "interval": round(half, 4)}
        if name != baseline:
            row |= {"difference": round(difference, 4), "difference_interval": round(spread, 4)}
        table.append(row | {"values": [round(n, 4) for n in numbers], "chosen": chosen.get(name)})
    return {
        "paper": paper,
        "claim": claim,
        "verdict": verdict(values[method], values[baseline], higher_is_better=higher_is_better),
        "scale": scale,
        "seeds": len(values[baseline]),
        "baseline": baseline,
        "method": method,
        "metric": metric,
        "table": table,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
        "cpu_seconds": round(time.process_time()),
        "commit": _commit(),
    }


def save(result: dict[str, Any]) -> None:
    """Write a result to ``results/`` and print its table."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['paper']}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{result['claim']}\n{result['metric']}, {result['seeds']} seeds, {result['cpu_seconds']} s of one core")
    for row in result["table"]:
        against = f"   {row['difference']:+.4f} ± {row['difference_interval']:.4f}" if "difference" in row else ""
        print(f"  {row['method']:36s} {row['mean']:.4f} ± {row['interval']:.4f}{against}   {row['chosen']}")
    print(f"verdict: {result['verdict']}", flush=True)


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return found.stdout.strip() or "unknown"
