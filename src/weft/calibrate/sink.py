"""Where gathered statistics go: memory, or a folder that appears when it is complete and goes on where it was stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.calibrate.facts import Facts, check_target, publish
from weft.calibrate.statistics import Statistics
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.save import remove_partial, save_tensors
from weft.engine.journal import WorkFolder
from weft.errors import OutputError, RecipeError


class MemorySink:
    """Where statistics go: a dictionary."""

    def __init__(self, dtype: torch.dtype):
        self.tensors: dict[str, Tensor] = {}
        self._dtype = dtype
        self.walk_folder: Path | None = None

    def begin(self, facts: Facts, model: Any) -> Any:
        """Enter before anything is gathered."""
        return nullcontext()

    def put(self, part: str, tensors: Iterable[tuple[str, Tensor]], facts: Facts) -> None:
        """Keep the tensors of one part of the model."""
        for name, tensor in tensors:
            self.tensors[name] = tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def finish(self, facts: Facts, force: bool) -> Statistics:
        """Everything that was gathered."""
        return Statistics(self.tensors, facts)


class FolderSink(MemorySink):
    """Where statistics go: a folder that appears when it is complete; each part is on disk before the next begins."""

    def __init__(self, output: str | os.PathLike[str], force: bool, dtype: torch.dtype):
        super().__init__(dtype)
        self._force = force
        self._work = WorkFolder(check_target(output, force))
        self._output = self._work.output

    def begin(self, facts: Facts, model: Any) -> Any:
        """Take up an unfinished run with the same options, or begin anew.

        Raises:
            OutputError: the output exists, is being written, or holds an unfinished run of something else.
        """
        print_of = model.fingerprint if isinstance(model, Checkpoint) else ""
        identity = {**json.loads(json.dumps(facts.provenance)), "files": print_of}
        self._work.acquire()
        before = self._work.read()[0]
        if before is not None and before != identity and not self._force:
            self._work.release()
            raise OutputError(
                f"{self._work.root}: holds an unfinished run with other options, data or another model. Finish it, or start "
                "over with force=True."
            )
        self.walk_folder = self._work.root / "walk"
        goes_on = before == identity and self._work.files.is_dir()
        if not goes_on:
            for folder in (self._work.files, self.walk_folder):
                shutil.rmtree(folder, ignore_errors=True)
            for part in self._work.root.glob("*.json"):
                part.unlink()
            self._work.files.mkdir()
        remove_partial(self._work.files)
        self._work.begin(None if goes_on else identity)
        return self

    def __enter__(self) -> None:
        """Nothing is left to do."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._work.root.exists():
            return
        if isinstance(error, KeyboardInterrupt | OutputError):
            self._work.release()  # the same command goes on from here
        else:
            self._work.remove()

    def put(self, part: str, tensors: Iterable[tuple[str, Tensor]], facts: Facts) -> None:
        """Write the tensors of one part of the model."""
        super().put(part, tensors, facts)
        path = self._work.files / f"{part}.safetensors"
        path.unlink(missing_ok=True)
        if self.tensors:
            save_tensors(path, self.tensors, {"format": "pt"})
        files = dict.fromkeys(self.tensors, path.name)
        self.tensors = {}
        (self._work.root / f"{part}.json").write_text(facts.to_json(files), encoding="utf-8")

    def finish(self, facts: Facts, force: bool) -> Statistics:
        """Give the folder its name."""
        files: dict[str, str] = {}
        facts = Facts(provenance=facts.provenance)  # in the order of the files, whichever run wrote them
        for path in sorted(self._work.root.glob("*.json")):
            part = json.loads(path.read_text(encoding="utf-8"))
            facts.add(Facts.from_json(part, path.name))
            files |= part["weight_map"]
        if not files:
            raise RecipeError("No statistics were gathered: no row of the data reached a layer that was chosen.")
        publish(self._work, facts, files, force)
        return Statistics.load(self._output)
