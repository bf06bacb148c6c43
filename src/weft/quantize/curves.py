"""Error curves: what each candidate configuration costs in each layer, in bytes and in error; data, and its file.

:func:`weft.quantize.error_curves` measures them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft.checkpoint.open import read_json
from weft.errors import CheckpointError, RecipeError, did_you_mean
from weft.quantize.allocate import Frontier, frontier

MEASURES = ("weight", "output", "relative", "block", "importance")
INPUTS = "inputs"
VERSION = 1


@dataclass
class Candidate:
    """One candidate in one layer.

    Attributes:
        nbytes: of the layer's tensors in files.
        errors: by measure.
        seconds: of the fit; not a part of what is compared or identified.
        failed: why there are no errors; empty if there are.
    """

    nbytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str = ""


@dataclass
class LayerCurve:
    """All candidates in one layer.

    Attributes:
        block: the block's name.
        inputs: the first layer that is given the same inputs; the layer itself, if there is none before it.
        size: number of weights.
        rows: of inputs in the data.
        candidates: by label.
    """

    block: str
    inputs: str
    size: int
    rows: int
    candidates: dict[str, Candidate] = field(default_factory=dict)


@dataclass
class Curves:
    """Error curves of a model's layers.

    Attributes:
        layers: by full name.
        facts: what they are of: the model, the candidates' settings, the data's digest.
    """

    layers: dict[str, LayerCurve]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Weights of each layer."""
        return {name: layer.size for name, layer in self.layers.items()}

    @property
    def labels(self) -> list[str]:
        """The candidates."""
        return list(dict.fromkeys(label for layer in self.layers.values() for label in layer.candidates))

    def together(self) -> list[list[str]]:
        """Layers that are given the same inputs, such as query, key and value: engines fuse them, and want one kind."""
        groups: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(layer.inputs, []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    @property
    def format(self) -> str:
        """Of the files whose bytes were counted; ``auto`` for a module in memory."""
        return str(self.facts.get("format", "auto"))

    @property
    def measure(self) -> str:
        """What choices are made by where nothing is said: ``block`` if it was measured, else ``relative``."""
        measured = {m for layer in self.layers.values() for one in layer.candidates.values() for m in one.errors}
        return "block" if "block" in measured else "relative"

    def by(self, measure: str = "") -> dict[str, dict[str, tuple[float, float]]]:
        """Bytes and error of each candidate of each layer, as :func:`weft.quantize.frontier` takes them.

        Args:
            measure: one of ``MEASURES``; empty: :attr:`measure`.

        Raises:
            RecipeError: the measure is not known, or was not taken.
        """
        measure = measure or self.measure
        if measure not in MEASURES:
            raise RecipeError(f"There is no measure {measure!r}.{did_you_mean(measure, MEASURES)}")
        found = {
            name: {
                label: (float(one.nbytes), one.errors[measure])
                for label, one in layer.candidates.items() if measure in one.errors
            }
            for name, layer in self.layers.items()
        }  # fmt: skip
        if not any(found.values()):
            raise RecipeError(
                f"These curves have no measure {measure!r}: block needs block_errors=True and batches, importance needs "
                "gradients."
            )
        return found

    def frontier(
        self,
        measure: str = "relative",
        *,
        together: str | Iterable[Sequence[str]] = INPUTS,
        budget: float | None = None,
    ) -> Frontier:
        """The least total error for every number of bytes.

        Args:
            measure: see :meth:`by`.
            together: groups of layers that choose one candidate; ``inputs``: :meth:`together`; () for none.
            budget: the largest that is of interest.
        """
        if isinstance(together, str) and together != INPUTS:
            raise RecipeError(f"Layers choose together by groups of names or {INPUTS!r}, got {together!r}.")
        groups = self.together() if isinstance(together, str) else list(together)
        return frontier(self.by(measure), together=groups, budget=budget, weights=sum(self.sizes.values()))

    def to_json(self) -> str:
        """The text of a file."""
        value = {"format": "weft curves", "version": VERSION, **asdict(self)}
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Curves:
        """Read a file of curves.

        Raises:
            CheckpointError: it is none.
        """
        value = read_json(Path(path))
        try:
            if value["format"] != "weft curves" or value["version"] != VERSION:
                raise ValueError(value["format"])
            layers = {name: layer_from(entry) for name, entry in value["layers"].items()}
            return cls(layers, dict(value["facts"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: holds no error curves of version {VERSION} ({error!r}). Measure them again."
            ) from None


def layer_from(entry: Mapping[str, Any]) -> LayerCurve:
    """A layer's curve from its JSON value."""
    candidates = {label: Candidate(**one) for label, one in entry["candidates"].items()}
    return LayerCurve(**{**entry, "candidates": candidates})
