"""What becomes of each tensor that a fine-tune changed: factored, saved whole with its module, or left out."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import natural_key
from weft.kernels.convert import OUTPUT_DTYPES

_EMBEDDING = re.compile(r"(embed\w*|wte|wpe|\w+_embeddings?|shared)")


@dataclass
class Changes:
    """The differences between two models, as a LoRA folder can hold them.

    Attributes:
        matrices: modules whose weight is factored -> whether it is an embedding table.
        biases: changed biases of those modules.
        modules: modules that are saved whole.
        left_out: changed tensors that go nowhere -> why.
        unchanged: number of equal tensors.
    """

    matrices: dict[str, bool] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0


def sort_changes(
    new: Checkpoint, old: Checkpoint, include: Sequence[str], exclude: Sequence[str], embeddings: str, others: str
) -> Changes:
    """Compare two models tensor by tensor; see :func:`weft.edit.extract_lora.extract_lora` for the policies."""
    changes = Changes()
    for name in sorted({*old} - {*new}, key=natural_key):
        if name not in old.aliases:
            changes.left_out[name] = "only the base has it"
    whole: list[str] = []
    for name in sorted(new, key=natural_key):
        if not _selected(name, include, exclude):
            continue
        if not _changed(new, old, name):
            changes.unchanged += 1
            continue
        module, _, leaf = name.rpartition(".")
        embedding = bool(_EMBEDDING.fullmatch(module.rpartition(".")[2]))
        matrix = _is_matrix(new, old, name)
        policy = embeddings if embedding else "factor" if matrix else others
        if policy == "leave":
            changes.left_out[name] = "left out on request"
        elif policy == "factor" and matrix and leaf == "weight":
            changes.matrices[module] = embedding
        else:
            whole.append(name)
    for name in whole:
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and module in changes.matrices:
            changes.biases.append(name)
        else:
            _save_module(changes, {n.rpartition(".")[0] for n in new}, module, name)
    return changes


def _is_matrix(new: Checkpoint, old: Checkpoint, name: str) -> bool:
    after, before = new[name], old.tensors.get(name)
    return (
        before is not None and len(after.shape) == 2 and after.shape == before.shape and 0 not in after.shape
        and after.dtype.name in OUTPUT_DTYPES and before.dtype.name in OUTPUT_DTYPES
    )  # fmt: skip


def _changed(new: Checkpoint, old: Checkpoint, name: str) -> bool:
    after, before = new[name], old.tensors.get(name)
    if before is None or after.shape != before.shape:
        return True
    if after.dtype is before.dtype:
        return not np.array_equal(after.bits().reshape(-1).view(np.uint8), before.bits().reshape(-1).view(np.uint8))
    return not np.array_equal(after.numpy(), before.numpy())


def _save_module(changes: Changes, paths: set[str], module: str, name: str) -> None:
    """Have PEFT save ``module``, and others whose paths end alike, which it then takes for the same."""
    if module in changes.modules:
        return
    alike = [p for p in paths if p.endswith(module)]
    if not module or any(p.startswith(f"{module}.") for p in paths):
        changes.left_out[name] = "PEFT saves modules, and this one holds others"
    elif any(p in changes.matrices for p in alike):
        changes.left_out[name] = "PEFT does not save modules that it adapts"
    else:
        changes.modules += [p for p in sorted(alike, key=natural_key) if p not in changes.modules]


def _selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in patterns)

    return (not include or matches(include)) and not matches(exclude)
