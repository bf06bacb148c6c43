"""Bone's two forms against LoRA with as many numbers, after one pass over few texts: is it ahead early?"""

from __future__ import annotations

from typing import Any

from studies._adapters import Trial, accuracies
from studies._harness import report, save

from weft.adapt import Bone, LoRA

FROZEN, PASSES = 5, 1
TRIALS = {  # one encoder layer: 13,824 numbers each
    "LoRA, rank 2": Trial(LoRA(rank=2, alpha=4.0), (1e-3, 3e-3, 1e-2)),
    "MiSS, rank 4": Trial(Bone(rank=4), (1e-4, 3e-4, 1e-3)),
    "Bat, rank 4": Trial(Bone(rank=4, form="block_affine"), (1e-4, 3e-4, 1e-3)),
    "linear probe": Trial(None, (1e-2, 3e-2, 1e-1)),
}


def run(seeds: int = 5) -> dict[str, Any]:
    """The study."""
    values, chosen = accuracies(TRIALS, seeds=seeds, frozen=FROZEN, passes=PASSES)
    return report(
        paper="bone",
        claim="With as many trainable numbers and one pass, MiSS is more accurate than LoRA.",
        scale="docstrings by package (10 classes, 777 texts), MiniLM-L6, adapters in its last layer",
        metric="test accuracy in %",
        higher_is_better=True,
        baseline="LoRA, rank 2",
        method="MiSS, rank 4",
        values=values,
        chosen=chosen,
    )


if __name__ == "__main__":
    save(run())
