"""The file beside the tensors of gathered statistics: what they are of, checked when it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.checkpoint.fingerprint import Fingerprint
from weft.engine.journal import WorkFolder
from weft.errors import CheckpointError, OutputError

FILE = "statistics.json"
VERSION = 1


@dataclass
class Facts:
    """What is known beside the tensors.

    Attributes:
        layers: for each layer the layer whose tensors it shares (itself, if it is the first) and the rows counted.
        experts: rows that each module of fused experts was given.
        fingerprints: of the weights that the statistics belong to, by the tensors' names.
        provenance: versions, model, data and options.
    """

    layers: dict[str, tuple[str, int]] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Facts) -> None:
        """Take what another part of the model gave."""
        self.layers |= other.layers
        self.experts |= other.experts
        self.fingerprints |= other.fingerprints

    def to_json(self, files: Mapping[str, str]) -> str:
        """The text of ``statistics.json``; ``files``: for each tensor its file."""
        value = {
            "format": "weft statistics",
            "version": VERSION,
            **vars(self),
            "weight_map": dict(sorted(files.items())),
        }
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Facts:
        """Checked facts of a file that may hold anything.

        Raises:
            CheckpointError: they are not of the right form.
        """
        if value.get("format") != "weft statistics" or value.get("version") != VERSION:
            raise CheckpointError(f"{where}: is no file of statistics of version {VERSION}. Gather them again.")
        parts: list[Any] = [value.get(k) for k in ("layers", "experts", "fingerprints", "provenance")]
        if not all(isinstance(p, dict) for p in parts):
            raise CheckpointError(f"{where}: needs layers, experts, fingerprints and provenance. Gather them again.")
        layers, experts, prints, provenance = parts
        facts = cls(provenance=provenance)
        for name, entry in layers.items():
            good = isinstance(entry, list) and len(entry) == 2 and entry[0] in layers and _is_count(entry[1])
            if not good:
                raise CheckpointError(
                    f"{where}: layer {name!r} needs the layer that it shares with and a number of rows."
                )
            facts.layers[name] = (entry[0], entry[1])
        for name, rows in experts.items():
            if not _is_count(rows):
                raise CheckpointError(f"{where}: experts {name!r} need a number of rows, found {rows!r}.")
            facts.experts[name] = rows
        for name, pair in prints.items():
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)):
                raise CheckpointError(f"{where}: the fingerprint of {name!r} is none.")
            facts.fingerprints[name] = (pair[0], pair[1])
        return facts


def check_target(folder: str | os.PathLike[str], force: bool) -> Path:
    """The absolute path of an output folder of statistics.

    Raises:
        OutputError: something is there that may not be replaced.
    """
    target = Path(os.path.abspath(Path(folder).expanduser()))
    WorkFolder(target).tidy()
    if target.exists() or target.is_symlink():
        if not force:
            raise OutputError(f"{target}: exists already. Choose another output, or replace it with force=True.")
        if not (target / FILE).is_file():
            raise OutputError(f"{target}: exists and holds no statistics, so force=True does not replace it.")
    return target


def publish(work: WorkFolder, facts: Facts, files: Mapping[str, str], force: bool) -> None:
    """Write ``statistics.json`` and give the folder its name."""
    (work.files / FILE).write_text(facts.to_json(files), encoding="utf-8")
    descriptor = os.open(work.files / FILE, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    work.publish(force, single_file=False)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
