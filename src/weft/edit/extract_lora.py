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

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.checkpoint.adapter import HEAD, tied_embedding
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.computed import as_float32
from weft.checkpoint.dtypes import DType, dtype_of
from weft.checkpoint.lora_folder import PREFIX
from weft.checkpoint.open import open_checkpoint
from weft.edit.adapter_report import AdapterReport
from weft.edit.extract_plan import Changes, sort_changes
from weft.edit.low_rank import low_rank
from weft.engine.adapter_writer import AdapterWriter, plain_config, task_type
from weft.engine.progress import Progress
from weft.errors import CheckpointError, NonFiniteError, RecipeError
from weft.kernels.convert import OUTPUT_DTYPES, from_float32

_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # their weights are stored (in, out)


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
) -> AdapterReport:
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
    with _opened(tuned) as new, _opened(base) as old, AdapterWriter(output, force=force) as writer:
        changes = sort_changes(new, old, include, exclude, embeddings, others)
        if not (changes.matrices or changes.modules):
            example = next((f", for example {n} is {why}" for n, why in changes.left_out.items()), "")
            raise CheckpointError(
                f"{new.name} and {old.name}: no tensor differs that the adapter could hold ({changes.unchanged} are equal"
                f"{example}). Check that they are a fine-tune and its base, and what is included."
            )
        job = _Job(new, old, changes, writer, stored, alpha)
        report = job.write(rank, min_energy, fan_in_fan_out, progress or Progress())
        config = job.configuration(base_model or str(old.config.get("_name_or_path") or old.name))
        writer.publish(config, {**report.to_dict(), "output": writer.output.name})
    return report


def _opened(model: Any) -> AbstractContextManager[Checkpoint]:
    """A model to close afterwards, unless the caller opened it."""
    return nullcontext(model) if isinstance(model, Checkpoint) else open_checkpoint(model)


@dataclass
class _Job:
    """One extraction: its tensors, and the adapter's configuration."""

    new: Checkpoint
    old: Checkpoint
    changes: Changes
    writer: AdapterWriter
    dtype: DType
    alpha: float | None
    flipped: bool = False

    def __post_init__(self) -> None:
        self.report = AdapterReport(
            self.writer.output, left_out=self.changes.left_out, unchanged=self.changes.unchanged
        )

    def write(
        self, rank: int, min_energy: float | None, fan_in_fan_out: bool | None, progress: Progress
    ) -> AdapterReport:
        """Factor and save every tensor."""
        matrices, modules = self.changes.matrices, self.changes.modules
        progress.start("factoring", len(matrices), sum(self.new[f"{m}.weight"].nbytes for m in matrices))
        tied = None if HEAD in self.new else tied_embedding(self.old)
        lost = total = 0.0
        for module, embedding in matrices.items():
            delta = as_float32(self.new[f"{module}.weight"]) - as_float32(self.old[f"{module}.weight"])
            energy = float(np.square(delta, dtype=np.float64).sum())
            if not np.isfinite(energy):
                raise NonFiniteError(f"{module}.weight: the difference holds NaN or infinity. A model is damaged.")
            flipped = embedding or (self._conv1d(module) if fan_in_fan_out is None else fan_in_fan_out)
            up, down, share = low_rank(delta.T if flipped else delta, rank, min_energy=min_energy)
            self._write_factors(module, up, down, embedding)
            self.report.lost[module] = share
            self.flipped |= flipped and not embedding
            lost, total = lost + share * energy, total + energy
            if embedding and f"{module}.weight" == tied:
                self._write_factors(HEAD.removesuffix(".weight"), down.T, up.T, False)
            progress.advance(module, self.new[f"{module}.weight"].nbytes)
        self.report.kept = 1 - lost / total if total else 1.0
        for name in self.changes.biases:
            self._write_whole(f"{name.removesuffix('bias')}base_layer.bias", self.new[name])
        for module in modules:
            for name in [n for n in self.new if n.rpartition(".")[0] == module]:
                self._write_whole(name, self.new[name])
                if name == tied:
                    self._write_whole(HEAD, self.new[name])
        if tied is not None and tied.removesuffix(".weight") in modules:
            modules.append(HEAD.removesuffix(".weight"))
        return self.report

    def _conv1d(self, module: str) -> bool:
        kind = self.old.config.get("model_type") or self.new.config.get("model_type")
        return kind in _CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D

    def _write_factors(self, module: str, up: np.ndarray, down: np.ndarray, embedding: bool) -> None:
        rank = up.shape[1]
        scale = 1.0 if self.alpha is None else self.alpha / rank
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        for name, factor in zip(names, (down, up)):
            values = np.ascontiguousarray(factor / np.sqrt(scale), np.float32)
            self.writer.add(f"{PREFIX}{module}.{name}", from_float32(values, self.dtype), self.dtype)
        self.report.ranks[module] = rank

    def _write_whole(self, name: str, tensor: LazyTensor) -> None:
        self.writer.add(PREFIX + name, tensor.bits(), tensor.dtype, tensor.shape)
        self.report.saved.append(name.replace(".base_layer", ""))

    def configuration(self, base_model: str) -> dict[str, Any]:
        """``adapter_config.json``."""
        architectures = [str(a) for a in self.new.config.get("architectures") or ()]
        return plain_config(
            self.report.ranks,
            alpha=self.alpha,
            modules_to_save=self.changes.modules,
            biases=bool(self.changes.biases),
            fan_in_fan_out=self.flipped,
            base_model=base_model,
            task_type=task_type(architectures, self.changes.modules),
        )
