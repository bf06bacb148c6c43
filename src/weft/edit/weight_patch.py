"""A patch as an object: extracted once, then applied, removed, scaled, added to others, and kept in a file.

The changes are robust weight signatures (:mod:`weft.edit.rws` has the mathematics, and when removing is exact).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from weft.checkpoint.memory import from_mapping
from weft.checkpoint.save import save_tensors
from weft.edit.originals import fingerprint, load_tensors, with_ties
from weft.edit.rws import STATISTICS, add_signatures, matches, signature
from weft.errors import MissingTensorError, RecipeError, ShapeError, did_you_mean

_KEY = "weft.patch"


@dataclass(frozen=True, eq=False)
class WeightPatch:
    """A change to some tensors of a model that can be applied, removed, scaled, added to others, and saved.

    Attributes:
        tensors: name -> what is added to the tensor of that name at scale 1.
        sources: where it comes from: checksums of the models, and the scale, of each extracted part.

    >>> import numpy as np
    >>> from weft.edit.weight_patch import WeightPatch
    >>> base, clean, robust = ({"conv.weight": np.float32(w)} for w in ([0, 0], [2, 0], [3, 1]))
    >>> patch = WeightPatch.extract(base, clean, robust, layers="conv.*")
    >>> patch.scaled(0.5).apply({"conv.weight": np.float32([7, 7])})
    {'conv.weight': array([7. , 7.5], dtype=float32)}
    """

    tensors: dict[str, Any]
    sources: tuple[dict[str, Any], ...] = ()

    @classmethod
    def extract(
        cls,
        base: Mapping[str, Any],
        standard: Mapping[str, Any],
        robust: Mapping[str, Any],
        *,
        layers: str = "*",
        whole: str = STATISTICS,
    ) -> WeightPatch:
        """The signatures of the floating-point tensors of ``standard`` whose names match ``layers``.

        Args:
            base, standard, robust: state dicts (torch or numpy) with one start, as for :func:`signature`.
            layers: name patterns, separated by spaces, such as ``"features.0.* features.3.*"``; the paper takes the
                first convolutions.
            whole: name patterns of tensors of which ``robust − standard`` is taken.

        Raises:
            RecipeError: no tensor matches. MissingTensorError, ShapeError: the models do not fit together.
        """
        chosen = from_mapping({name: value for name, value in standard.items() if matches(name, layers)})
        names = [name for name, tensor in chosen.items() if tensor.dtype.floating]
        if not names:
            raise RecipeError(f"layers: no floating-point tensor matches {layers!r}.{did_you_mean(layers, standard)}")
        labelled = {"base": base, "standard": standard, "robust": robust}
        models = {label: _subset(model, names, label) for label, model in labelled.items()}
        tensors = signature(models["base"], models["standard"], models["robust"], whole=whole)
        source = {label: _checksum(model) for label, model in models.items()}
        return cls(tensors, ({"method": "rws", **source, "whole": whole, "scale": 1.0},))

    def apply(self, state: Mapping[str, Any], scale: float = 1.0) -> dict[str, Any]:
        """``state`` (torch or numpy) with ``scale`` times the patch added.

        Tensors outside the patch are the same objects as before; ties between patched tensors are kept.

        Raises:
            MissingTensorError, ShapeError: the model does not have the patch's tensors.
            RecipeError: a batch-norm variance would become negative.
        """
        targets = _subset(state, self.tensors, "model")
        return with_ties(state, add_signatures(targets, [self.tensors], scale=scale))

    def remove(self, state: Mapping[str, Any], scale: float = 1.0) -> dict[str, Any]:
        """``state`` with ``scale`` times the patch subtracted; the bits before only if applying it was not rounded."""
        return self.apply(state, -scale)

    def scaled(self, scale: float) -> WeightPatch:
        """The patch at another strength."""
        sources = tuple({**source, "scale": source["scale"] * scale} for source in self.sources)
        return WeightPatch({name: tensor * scale for name, tensor in self.tensors.items()}, sources)

    def __add__(self, other: WeightPatch) -> WeightPatch:
        tensors = dict(self.tensors)
        for name, tensor in other.tensors.items():
            if name in tensors and tuple(tensors[name].shape) != tuple(tensor.shape):
                shapes = f"{list(tensors[name].shape)} and {list(tensor.shape)}"
                raise ShapeError(f"{name}: patches of shapes {shapes} cannot be added; they are for different models.")
            tensors[name] = tensors[name] + tensor if name in tensors else tensor
        return WeightPatch(tensors, self.sources + other.sources)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file with the sources in its metadata; raises ``OutputError`` if it exists."""
        save_tensors(path, self.tensors, {_KEY: json.dumps(self.sources)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeightPatch:
        """Read what :meth:`save` wrote, as torch tensors; raises ``CheckpointError`` if it is another kind of file."""
        tensors, sources = load_tensors(path, _KEY, "weight patch")
        return cls(tensors, tuple(sources))


def _subset(model: Mapping[str, Any], names: Iterable[str], label: str) -> dict[str, Any]:
    for name in names:
        if name not in model:
            raise MissingTensorError(
                f"The {label} has no tensor {name!r}.{did_you_mean(name, model)} A patch is for models of one "
                "architecture; leave tensors that only some have out with layers."
            )
    return {name: model[name] for name in names}


def _checksum(model: Mapping[str, Any]) -> str:
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(from_mapping(model).items()):
        digest.update(f"{name} {fingerprint(tensor)}\n".encode())
    return digest.hexdigest()
