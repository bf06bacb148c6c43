"""transformers' Trainer for models with adapters: checkpoints hold the adapter, and resuming puts it back.

The plain Trainer trains such models as well; but what it saves is the baked model, from which training cannot go on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from weft.adapt.folder import restore_adapter_, save_adapter
from weft.adapt.switch import adapters
from weft.errors import CheckpointError, MissingDependencyError, RecipeError, did_you_mean

try:
    from transformers import Trainer
    from transformers.trainer import TRAINING_ARGS_NAME
except ImportError:
    raise MissingDependencyError(
        "weft.adapt.trainer needs transformers and accelerate: pip install 'weft[hf]' accelerate."
    ) from None

FOLDER = "adapter"  # inside each checkpoint


class AdapterTrainer(Trainer):
    """transformers' Trainer whose checkpoints hold one adapter, in the folder ``adapter`` of each.

    ``resume_from_checkpoint`` and ``load_best_model_at_end`` work as with PEFT's models; attach the adapter before. The
    folders are those of ``weft.adapt.save_adapter``: PEFT loads them where it knows the method.

    Args:
        adapter: name of the adapter to save.
        arguments, options: as for ``transformers.Trainer``.

    Raises:
        RecipeError: the model has no such adapter.
    """

    def __init__(self, *arguments: Any, adapter: str = "default", **options: Any):
        super().__init__(*arguments, **options)
        there = adapters(self.model)
        if adapter not in there:
            raise RecipeError(
                f"The model has no adapter {adapter!r}: call weft.adapt_ before making the trainer.{did_you_mean(adapter, there)}"
            )
        self.adapter = adapter

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.model, folder / FOLDER, self.adapter, force=True)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._restore(self.state.best_model_checkpoint)

    def _restore(self, checkpoint: str | os.PathLike[str]) -> None:
        folder = Path(checkpoint) / FOLDER
        if not folder.is_dir():
            raise CheckpointError(f"{checkpoint}: has no folder {FOLDER!r}, so it was not saved by AdapterTrainer.")
        restore_adapter_(self.model, folder, name=self.adapter)
