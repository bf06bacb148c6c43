"""The models of a recipe: their weights and their tokenizers, by the names that the recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.checkpoint.adapter import with_adapter
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.errors import CheckpointError
from weft.recipe.tokenizer_files import TokenizerFiles


@dataclass
class Opened:
    """The models of a recipe, opened once each."""

    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: dict[str, TokenizerFiles] = field(default_factory=dict)

    def get(self, name: str) -> Checkpoint:
        """The checkpoint called ``name`` in the recipe; no two have the same :attr:`Checkpoint.name`."""
        if name not in self.checkpoints:
            found = self._open(name)
            if not found.tensors:
                raise CheckpointError(f"{name}: holds no tensors.")
            if isinstance(self.given.get(name), Mapping) and not isinstance(self.given[name], Checkpoint):
                found.name = name
            taken = {c.name for c in self.checkpoints.values()}
            if found.name in taken:
                numbered = (f"{found.name} ({i})" for i in range(2, len(taken) + 2))
                found = copy(found)  # the caller's own keeps its name
                found.name = next(n for n in numbered if n not in taken)
            self.checkpoints[name] = found
        return self.checkpoints[name]

    def add(self, name: str, checkpoint: Checkpoint, tokenizer: TokenizerFiles) -> None:
        """Make the result of a step a model that later steps can name."""
        self.checkpoints[name] = checkpoint
        self.tokenizers[name] = tokenizer

    def tokenizer(self, name: str) -> TokenizerFiles:
        """The tokenizer of the model called ``name`` in the recipe."""
        if name in self.tokenizers:
            return self.tokenizers[name]
        folder = Path(name)
        if name not in self.checkpoints and name not in self.given and folder.is_dir():
            return TokenizerFiles(folder.resolve().name, folder)  # weights are not needed
        checkpoint = self.get(name)
        return TokenizerFiles(checkpoint.name, checkpoint.folder)

    def close(self) -> None:
        """Close all that were opened here; a checkpoint that the caller passed in stays open."""
        for name, checkpoint in self.checkpoints.items():
            if not isinstance(self.given.get(name), Checkpoint):
                checkpoint.close()

    def _open(self, name: str) -> Checkpoint:
        if name.startswith("@") and "+" in name:
            step, _, adapter = name.partition("+")
            return with_adapter(self.get(step), open_checkpoint(self.given.get(adapter, adapter)))
        return open_checkpoint(self.given.get(name, name))
