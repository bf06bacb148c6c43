"""Statistics of a model on data: kept in memory or in a folder, and read by layer.

A folder holds safetensors files with tensors ``layer/statistic`` and ``statistics.json``, which says which file holds
which tensor, which layers were given the same tensor (and share its statistics), how many rows were counted, and what
all was gathered with: versions, fingerprints of the weights, a digest of the data, the options. There are no times and no
paths in it: the same model, data and options give the same folder.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weft.calibrate.facts import FILE, Facts, check_target, publish
from weft.calibrate.sums import percentile
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.fingerprint import Fingerprint, differing, fingerprint, fingerprint_of
from weft.checkpoint.folder import from_safetensors
from weft.checkpoint.open import open_checkpoint, read_json
from weft.checkpoint.save import save_tensors
from weft.engine.journal import WorkFolder
from weft.errors import CheckpointError, RecipeError, did_you_mean

_GATHERED_BY = {
    "minimum": "range", "maximum": "range", "mean_abs": "scales", "max_abs": "scales", "square_sum": "scales", "histogram": "percentiles",
}  # fmt: skip


class Statistics:
    """What :func:`weft.calibrate.collect` gathered; tensors in a folder are read when they are asked for.

    >>> import torch, weft.calibrate
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> found = weft.calibrate.collect(model, [torch.ones(3, 2)], "gram,scales")
    >>> found.layers, found.gram("0").tolist(), found.mean_abs("0").tolist()
    (['0', '2'], [[3.0, 3.0], [3.0, 3.0]], [1.0, 1.0])
    """

    def __init__(self, tensors: Mapping[str, Tensor | LazyTensor], facts: Facts):
        self.facts = facts
        self._tensors = tensors
        self._alive: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()

    @property
    def layers(self) -> list[str]:
        """Layers whose inputs were counted."""
        return list(self.facts.layers)

    @property
    def experts(self) -> list[str]:
        """Modules of fused experts whose routing was counted."""
        return list(self.facts.experts)

    @property
    def names(self) -> list[str]:
        """``layer/statistic`` of all tensors."""
        return sorted(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self._tensors.values())

    def rows(self, layer: str) -> int:
        """How many rows of inputs were counted; tokens that an expert was given."""
        return self._layer(layer)[1]

    def has(self, layer: str, kind: str) -> bool:
        """Whether a statistic of a layer is there."""
        leader, rows = self.facts.layers.get(layer, ("", 0))
        return rows > 0 and f"{leader}/{kind}" in self._tensors

    def shared(self, layer: str) -> list[str]:
        """Layers that were given the very same inputs, the layer itself among them."""
        leader = self._layer(layer)[0]
        return [n for n, (first, _) in self.facts.layers.items() if first == leader]

    def gram(self, layer: str) -> Tensor:
        """Σ xᵀx (in, in) of a layer's inputs; (groups, n, n) over the patches of a convolution with groups.

        Raises:
            RecipeError: there is no such layer or statistic, or no row reached the layer.
        """
        return self._of_layer(layer, "gram")

    def mean(self, layer: str) -> Tensor:
        """The mean of each input channel."""
        return self._of_layer(layer, "mean")

    def minimum(self, layer: str) -> Tensor:
        """The smallest value of each input channel."""
        return self._of_layer(layer, "minimum")

    def maximum(self, layer: str) -> Tensor:
        """The largest value of each input channel."""
        return self._of_layer(layer, "maximum")

    def mean_abs(self, layer: str) -> Tensor:
        """The mean size of each input channel."""
        return self._of_layer(layer, "mean_abs")

    def max_abs(self, layer: str) -> Tensor:
        """The largest size of each input channel."""
        return self._of_layer(layer, "max_abs")

    def norm(self, layer: str) -> Tensor:
        """‖x‖₂ of each input channel over all rows."""
        return self.square_sum(layer).sqrt()

    def square_sum(self, layer: str) -> Tensor:
        """Σ x² of each input channel over all rows."""
        return self._of_layer(layer, "square_sum")

    def percentile(self, layer: str, share: float) -> float:
        """The value below which a share of all input values lies; see :func:`weft.calibrate.sums.percentile`."""
        return percentile(self._of_layer(layer, "histogram"), share)

    def routing(self, experts: str) -> Tensor:
        """How many tokens chose each expert of a module (int64)."""
        return self._tensor(experts, "routing_counts", self.facts.experts)

    def routing_weights(self, experts: str) -> Tensor:
        """The sum of the weights that tokens gave each expert."""
        return self._tensor(experts, "routing_weights", self.facts.experts)

    def gradient(self, parameter: str) -> Tensor:
        """The mean gradient by a parameter."""
        return self._tensor(parameter, "gradient", self._parameters())

    def fisher(self, parameter: str, kind: str) -> Tensor:
        """The Fisher diagonal of a parameter; ``kind``: exact, sampled or empirical."""
        return self._tensor(parameter, f"fisher_{kind}", self._parameters())

    def check(self, model: nn.Module | Checkpoint | str | os.PathLike[str] | Mapping[str, nn.Module]) -> None:
        """Whether they are of this model: its weights' fingerprints are compared, a few bytes of each.

        Args:
            model: a model, a folder, an open checkpoint, or layers by full name.

        Raises:
            CheckpointError: weights differ, or the model has none of the names.
        """
        now = _fingerprints(model, self.facts.fingerprints)
        if not now:
            known = did_you_mean(next(iter(self.facts.fingerprints), ""), _names(model))
            raise CheckpointError(f"The statistics are of another model: none of its weights is in this one.{known}")
        changed = differing({n: list(p) for n, p in self.facts.fingerprints.items()}, now)
        if changed:
            raise CheckpointError(
                f"The statistics are of another model: {changed[0]} and {len(changed) - 1} others of {len(now)} weights "
                "differ. Gather them again with this model."
            )

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write to a folder, which appears complete or not at all.

        Raises:
            OutputError: it exists (and was not made here, or without ``force``), or cannot be written.
        """
        target = check_target(folder, force)
        work = WorkFolder(target)
        work.acquire()
        try:
            shutil.rmtree(work.files, ignore_errors=True)
            work.files.mkdir()
            tensors = {n: t if isinstance(t, Tensor) else t.torch() for n, t in sorted(self._tensors.items())}
            files = dict.fromkeys(tensors, "statistics.safetensors")
            save_tensors(work.files / "statistics.safetensors", tensors, {"format": "pt"})
            publish(work, self.facts, files, force)
        finally:
            if work.root.exists():
                work.remove()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Statistics:
        """Open a folder of statistics without reading its tensors.

        Raises:
            CheckpointError: it is damaged or incomplete, or holds something else.
        """
        path = Path(folder)
        if not (path / FILE).is_file():
            raise CheckpointError(f"{path}: holds no {FILE}; give a folder that `weft calibrate` made.")
        facts = Facts.from_json(read_json(path / FILE), str(path / FILE))
        opened = from_safetensors([], path.name, folder=path, index=path / FILE)
        known = {
            *facts.layers,
            *facts.experts,
            *(n.rpartition(".")[0] for n in facts.fingerprints),
            *facts.fingerprints,
        }
        for key, tensor in opened.items():
            name, _, kind = key.rpartition("/")
            square = kind != "gram" or (len(tensor.shape) in (2, 3) and tensor.shape[-1] == tensor.shape[-2])
            if name not in known or not square:
                raise CheckpointError(
                    f"{path}: {key!r} {list(tensor.shape)} is no statistic of a layer named in {FILE}."
                )
        return cls(opened.tensors, facts)

    def _layer(self, layer: str) -> tuple[str, int]:
        if layer not in self.facts.layers:
            raise RecipeError(f"There are no statistics of {layer!r}.{did_you_mean(layer, self.facts.layers)}")
        return self.facts.layers[layer]

    def _of_layer(self, layer: str, kind: str) -> Tensor:
        leader, rows = self._layer(layer)
        if not rows:
            raise RecipeError(
                f"{layer}: no row of the data reached it (an expert that no token chose), so it has no statistics. Use more "
                "data, or treat it without."
            )
        return self._tensor(leader, kind, self.facts.layers)

    def _tensor(self, name: str, kind: str, known: Mapping[str, Any]) -> Tensor:
        key = f"{name}/{kind}"
        if key not in self._tensors:
            if name not in known:
                raise RecipeError(f"There are no statistics of {name!r}.{did_you_mean(name, known)}")
            kinds = sorted(k.rpartition("/")[2] for k in self._tensors if k.startswith(f"{name}/"))
            raise RecipeError(
                f"{name}: {kind} was not gathered; there are {', '.join(kinds) or 'none'}. Gather statistics again with "
                f"{_GATHERED_BY.get(kind, kind)} among them."
            )
        held = self._tensors[key]
        if isinstance(held, Tensor):
            return held
        alive = self._alive.get(key)
        if alive is None:
            alive = self._alive[key] = held.torch()
        return alive

    def _parameters(self) -> dict[str, None]:
        return dict.fromkeys(
            k.rpartition("/")[0] for k in self._tensors if k.rpartition("/")[2].startswith(("gradient", "fisher"))
        )


def _names(model: Any) -> list[str]:
    if isinstance(model, nn.Module):
        return [n for n, _ in model.named_parameters()]
    return [f"{n}.weight" for n in model] if isinstance(model, dict) else list(open_checkpoint(model))


def _fingerprints(model: Any, wanted: Mapping[str, Any]) -> dict[str, Fingerprint]:
    """Of those weights of a model that are wanted."""
    if isinstance(model, nn.Module):
        from weft.calibrate.experts import unfused

        with unfused(model) as experts:
            state: dict[str, Any] = {**dict(model.named_parameters(remove_duplicate=False))}
            state |= {f"{n}.weight": s.weight for n, s in experts.items()}
            return {n: fingerprint_of(state[n]) for n in wanted if n in state}
    if isinstance(model, Mapping) and not isinstance(model, Checkpoint):
        return {f"{n}.weight": fingerprint_of(m.weight) for n, m in model.items() if f"{n}.weight" in wanted}
    opened = open_checkpoint(model)
    try:
        found = {}
        for name in wanted:  # a file may lack the base model's prefix
            stored = next((n for n in (name, name.partition(".")[2]) if n in opened), None)
            if stored is not None:
                found[name] = fingerprint(opened[stored])
        return found
    finally:
        if opened is not model:
            opened.close()
