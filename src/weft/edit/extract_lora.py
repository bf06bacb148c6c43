"""Turn a fine-tune into a small adapter: the difference to its base, kept to the directions that matter.

    Wᵢ − W₀ᵢ ≈ s · Bᵢ Aᵢ            for every matrix that changed, see :mod:`weft.edit.low_rank`

What has no low rank (norms, biases, new heads, by default embeddings) is saved whole beside the factors, so that the
adapter on its base gives the fine-tune back up to what truncation loses.

Differences from mergekit's extraction (arXiv:2403.13257): ranks may follow the energy of each matrix; changed tensors
that are not matrices are saved or listed, never dropped unsaid; only matrices that changed are targeted; factors of
tied embeddings are written for both ends.
Complexity: one factorisation a changed matrix; memory is one matrix and its factorisation. Re-implemented from the
equations.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weft.checkpoint.adapter import tied_embedding
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.computed import as_float32
from weft.checkpoint.dtypes import DType, dtype_of
from weft.checkpoint.lora_folder import PREFIX
from weft.checkpoint.open import natural_key, open_checkpoint
from weft.edit.low_rank import low_rank
from weft.engine.adapter_writer import AdapterWriter
from weft.engine.progress import Progress
from weft.errors import CheckpointError, RecipeError
from weft.kernels.convert import OUTPUT_DTYPES, from_float32

_EMBEDDING = re.compile(r"(embed\w*|wte|wpe|\w+_embeddings?|shared)")
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # their weights are stored (in, out)
_NO_TARGET = "dummy-target-modules"  # how PEFT spells an adapter that only saves modules
HEAD = "lm_head"


@dataclass
class Extraction:
    """What an extraction did.

    Attributes:
        output: the adapter's folder.
        ranks: by module.
        lost: by module, share of the change's squared norm that the factors do not hold.
        kept: share of the squared norm of all factored changes that the adapter holds.
        saved: tensors saved whole.
        left_out: changed tensors that the adapter does not hold -> why.
        unchanged: number of tensors equal to the base's.
    """

    output: Path
    ranks: dict[str, int] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    kept: float = 1.0
    saved: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "output": str(self.output)}

    def text(self) -> str:
        """A few lines for a terminal."""
        ranks = sorted(set(self.ranks.values()))
        span = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else "none"
        lines = [
            f"{self.output}: {len(self.ranks)} matrices ({span}), {self.kept:.4%} of their squared change kept",
            f"{len(self.saved)} tensors saved whole, {self.unchanged} unchanged",
        ]
        worst = sorted(self.lost, key=lambda m: -self.lost[m])[:3]
        lines += [f"  {self.lost[m]:.2%} lost in {m} (rank {self.ranks[m]})" for m in worst if self.lost[m] > 1e-4]
        lines += [f"  not in the adapter: {name} ({why})" for name, why in self.left_out.items()]
        return "\n".join(lines)


def extract_lora(
    tuned: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint,
    base: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint,
    output: str | os.PathLike[str],
    *,
    rank: int = 32,
    alpha: float | None = None,
    min_energy: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: str = "save",
    others: str = "save",
    fan_in_fan_out: bool | None = None,
    dtype: str = "float32",
    base_model: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Write the difference of two models as a LoRA folder that PEFT loads.

    Args:
        tuned, base: models as for ``weft.open``.
        output: the folder to make.
        rank: the largest rank of a module.
        alpha: PEFT's lora_alpha; by default each module's rank, so that the scale is 1. The product is the same.
        min_energy: give each module the smallest rank that keeps this share of its change's squared norm.
        include, exclude: globs of tensor names; without ``include`` all tensors.
        embeddings: "save" changed embeddings whole, "factor" them, or "leave" them out.
        others: "save" other changed tensors (norms, biases, convolutions, new heads) whole, or "leave" them out.
        fan_in_fan_out: weights are stored (in, out); by default so for the ``Conv1D`` layers of GPT-2 and its kin.
        dtype: of the factors: float32, bfloat16 or float16.
        base_model: what PEFT is told that the base is called; by default as ``base`` calls itself.
        force: replace an output that weft made.
        progress: where to report.

    Raises:
        CheckpointError: the models do not differ, or have nothing in common. RecipeError: a parameter is wrong.
        OutputError: the output exists or cannot be written; nothing is left behind.

    >>> import numpy as np, tempfile
    >>> base = {"layers.0.fc.weight": np.zeros((3, 2), np.float32)}
    >>> tuned = {"layers.0.fc.weight": np.float32([[1, 2], [2, 4], [0, 0]])}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     extract_lora(tuned, base, f"{folder}/adapter", rank=1).ranks
    {'layers.0.fc': 1}
    """
    if embeddings not in ("save", "factor", "leave") or others not in ("save", "leave"):
        raise RecipeError(f"embeddings is save, factor or leave, others save or leave; got {embeddings!r}, {others!r}.")
    if alpha is not None and not alpha > 0:
        raise RecipeError(f"alpha must be positive, got {alpha}.")
    stored = dtype_of(dtype)
    if stored.name not in OUTPUT_DTYPES:
        raise RecipeError(f"Factors are written as float32, bfloat16 or float16, not {dtype}.")
    with open_checkpoint(tuned) as new, open_checkpoint(base) as old, AdapterWriter(output, force=force) as writer:
        job = _Job(new, old, writer, rank, alpha, min_energy, stored)
        job.sort(include, exclude, embeddings, others)
        report = job.factor_all(fan_in_fan_out, progress or Progress())
        config = job.configuration(base_model or str(old.config.get("_name_or_path") or old.name))
        writer.publish(config, {**report.to_dict(), "output": writer.output.name})
    return report


class _Job:
    """One extraction: what is factored, what is saved whole, and the adapter's configuration."""

    def __init__(
        self,
        new: Checkpoint,
        old: Checkpoint,
        writer: AdapterWriter,
        rank: int,
        alpha: float | None,
        min_energy: float | None,
        dtype: DType,
    ):
        self.new, self.old, self.writer = new, old, writer
        self.rank, self.alpha, self.min_energy, self.dtype = rank, alpha, min_energy, dtype
        self.report = Extraction(writer.output)
        self.matrices: dict[str, bool] = {}  # module -> whether it is an embedding
        self.modules: list[str] = []  # saved whole
        self.flipped = False
