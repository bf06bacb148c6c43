"""Rank of the recurrent weights at the start against how much they and the tangent kernel change by training."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from studies._harness import digits, report, save
from torch import Tensor, nn
from torch.nn import functional

from weft.init import low_rank_
from weft.measure import laziness

UNITS, GAIN, TRAIN, BATCH, RATE, LOSS, MOST = 100, 1.25, 512, 32, 0.01, 0.3, 4000
STARTS = {
    "rank 100": (100, "frobenius"),
    "rank 10": (10, "frobenius"),
    "rank 2": (2, "frobenius"),
    "rank 2, equal spectral norm": (2, "spectral"),
    "rank 2, equal spectral radius": (2, "radius"),
}


class RowByRow(nn.Module):
    """Reads an image from top to bottom and answers behind the last row."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, UNITS, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(UNITS, 10)

    def activity(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) -> (n, units) at the last row."""
        return self.rnn(images.flatten(1, 2))[0][:, -1]

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) -> (n, 10)."""
        return self.head(self.activity(images))


def measure(name: str, seed: int) -> dict[str, float]:
    rank, match = STARTS[name]
    data = digits(seed, TRAIN)
    images, labels = data.train
    torch.manual_seed(seed)
    model = RowByRow()
    nn.init.normal_(model.rnn.weight_hh_l0, std=GAIN / UNITS**0.5)
    low_rank_(model.rnn.weight_hh_l0, rank, match)
    before = deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for step in range(MOST):
        if step % 20 == 0:
            with torch.no_grad():
                loss = functional.cross_entropy(model(images), labels).item()
            if loss <= LOSS:
                break
        batch = torch.randint(TRAIN, (BATCH,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    else:
        raise RuntimeError(
            f"{name}, seed {seed}: the loss is still {loss:.3f} after {MOST} steps, so nothing is comparable"
        )
    found = laziness(
        before, model, data.validation[0][:32], parameters="rnn.weight_hh_l0", layer=lambda m, x: m.activity(x)
    )
    return {
        "kernel alignment": found.kernel_alignment or 0.0,
        "representation alignment": found.representation_alignment or 0.0,
        "weight change": found.weight_change,
        "sign agreement": found.sign_agreement or 0.0,
        "steps": float(step),
        "loss": loss,
    }


def run(seeds: int = 6) -> dict[str, Any]:
    """The study."""
    found = {name: [measure(name, seed) for seed in range(seeds)] for name in STARTS}
    result = report(
        paper="rich-lazy",
        claim="Recurrent weights of high rank at the start learn lazier than those of low rank and the same Frobenius norm.",
        scale=f"digits row by row, ReLU RNN of {UNITS} units, SGD to a training loss of {LOSS}, 32 probe images",
        metric="alignment of the tangent kernel of the recurrent weights before and after training",
        higher_is_better=True,
        baseline="rank 2",
        method="rank 100",
        values={name: [m["kernel alignment"] for m in rows] for name, rows in found.items()},
        chosen={},
    )
    means = {
        name: {key: round(float(np.mean([m[key] for m in rows])), 4) for key in rows[0]} for name, rows in found.items()
    }
    return {**result, "means": means}


if __name__ == "__main__":
    save(run())
