"""What a rewritten model is made of before it is complete: one file for each finished block.

``OUT.partial/parts/`` holds ``run.json``, which says what is being done, and ``0007.safetensors`` for block 7: the tensors that
are new, with the names that they replace and the block's report as JSON among the metadata. A run that was stopped finds the
parts of the same run and goes on behind them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.open import open_path
from weft.checkpoint.save import remove_partial, save_tensors
from weft.errors import OutputError, disk_error


@dataclass
class Part:
    """What became of one block.

    Attributes:
        tensors: new tensors by their names in the output.
        replaces: names in the input whose tensors these take the place of, each with its new names.
        report: JSON facts by layer.
        blocks: JSON facts by block.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    replaces: dict[str, list[str]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)


class Parts:
    """The finished blocks of a run.

    Args:
        folder: where they lie.
        identity: changes with whatever changes the result.
        force: remove the parts of another run.

    Raises:
        OutputError: parts of another run are there, or the folder cannot be made.
    """

    def __init__(self, folder: Path, identity: str, force: bool = False):
        self.folder = folder
        self.found = self._same(identity)
        if self.found:
            remove_partial(folder)
            return
        if not force and folder.is_dir() and self._paths():
            raise OutputError(
                f"{folder.parent}: holds an unfinished run with other options, data, another model or of another version of weft. "
                "Finish it with the command that began it, or discard it with force=True."
            )
        shutil.rmtree(folder.parent / "walk", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(json.dumps({"identity": identity}), encoding="utf-8")
        except OSError as error:
            raise disk_error(folder, error) from None

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self._path(number).is_file()

    def put(self, number: int, part: Part) -> None:
        """Write a block's part; it is there completely or not at all."""
        self._path(number).unlink(missing_ok=True)
        facts = json.dumps({"replaces": part.replaces, "report": part.report, "blocks": part.blocks})
        save_tensors(self._path(number), part.tensors, {"format": "pt", "weft": facts})

    def report(self, what: str = "report") -> dict[str, Any]:
        """Facts of all parts, by layer, or (``"blocks"``) by block."""
        found: dict[str, Any] = {}
        for path in self._paths():
            with open_path(path) as part:
                found |= json.loads(part.metadata["weft"])[what]
        return found

    def assembled(self, checkpoint: Checkpoint, config: dict[str, Any]) -> tuple[Checkpoint, list[str]]:
        """The whole output as a checkpoint, and the names of its new tensors.

        Args:
            checkpoint: the input, whose other tensors come as they are; those that share their storage with a replaced one
                are replaced too.
            config: the output's ``config.json``.
        """
        new: dict[str, LazyTensor] = {}
        replaces: dict[str, list[str]] = {}
        for path in self._paths():
            part = open_path(path)
            new |= part.tensors
            replaces |= json.loads(part.metadata["weft"])["replaces"]
        tensors: dict[str, LazyTensor] = {}
        for name in checkpoint:
            source = checkpoint.aliases.get(name, name)
            if source != name and source in replaces and replaces[source] == [source]:
                tensors[name] = new[source]
                continue
            for made in replaces.get(name, [name]):
                tensors[made] = new.get(made, checkpoint.tensors.get(made, checkpoint.tensors[name]))
        changed = sorted(n for n, t in tensors.items() if t is not checkpoint.tensors.get(n))
        whole = Checkpoint(checkpoint.name, tensors, {}, config, dict(checkpoint.metadata), checkpoint.folder)
        whole.packed = checkpoint.packed  # so that the configuration is written anew
        return whole, changed

    def _same(self, identity: str) -> bool:
        try:
            known = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(known, Mapping) and known.get("identity") == identity

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}.safetensors"

    def _paths(self) -> list[Path]:
        try:
            return sorted(p for p in self.folder.iterdir() if p.suffix == ".safetensors" and not p.name.startswith("."))
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be read ({os.strerror(error.errno or 0)}).") from None
