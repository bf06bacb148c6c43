"""The hidden states between two blocks, one tensor a batch: in memory, or in files beyond a budget."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.checkpoint.open import open_checkpoint
from weft.checkpoint.save import save_tensors
from weft.errors import OutputError, disk_error


class Activations:
    """Tensors by number; those that do not fit into the budget lie in a folder.

    Args:
        budget: bytes to keep in memory.
        folder: where the others go, and all of them with ``keep``; a temporary folder if None.
        keep: write everything, so that a walk can resume; otherwise files are removed by :meth:`close`.

    >>> import torch
    >>> store = Activations(budget=0)
    >>> store[0] = torch.ones(2, 3)
    >>> store[0].sum().item(), store.nbytes_in_memory
    (6.0, 0)
    >>> store.close()
    """

    def __init__(self, budget: int, folder: Path | None = None, *, keep: bool = False):
        self.budget = budget
        self.keep = keep
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._held: dict[int, Tensor] = {}
        self._written: set[int] = set()

    @property
    def nbytes_in_memory(self) -> int:
        """Bytes of the tensors that are held."""
        return sum(t.nbytes for t in self._held.values())

    def __len__(self) -> int:
        return len(self._held.keys() | self._written)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __setitem__(self, number: int, value: Tensor) -> None:
        self._held.pop(number, None)
        value = value.detach()
        fits = self.nbytes_in_memory + value.nbytes <= self.budget
        if fits:
            # a view would keep the whole tensor that it was cut from
            self._held[number] = value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
        if self.keep or not fits:
            path = self._path(number)
            path.unlink(missing_ok=True)
            save_tensors(path, {"hidden": value.contiguous()}, {"format": "pt"})
            self._written.add(number)

    def __getitem__(self, number: int) -> Tensor:
        held = self._held.get(number)
        if held is not None:
            return held.clone()  # who asks may work in place
        with open_checkpoint(self._path(number)) as file:
            return file["hidden"].torch()

    def take(self, number: int) -> Tensor:
        """A tensor that is not asked for again: it is not held any more.

        >>> import torch
        >>> store = Activations(budget=100)
        >>> store[0] = torch.ones(2)
        >>> store.take(0).sum().item(), store.nbytes_in_memory
        (2.0, 0)
        """
        held = self._held.pop(number, None)
        return self[number] if held is None else held

    def reopen(self, count: int) -> None:
        """Take the files of an earlier walk as they are.

        Raises:
            OutputError: one is missing.
        """
        missing = [i for i in range(count) if not self._path(i).is_file()]
        if missing:
            raise OutputError(
                f"{self._path(missing[0])}: is missing, so the walk cannot go on; remove the folder and start again."
            )
        self._written = set(range(count))

    def close(self) -> None:
        """Forget everything; files go unless they are to be kept."""
        self._held.clear()
        if self._temporary is not None:
            self._temporary.cleanup()
        elif not self.keep and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="weft-")
            self._folder = Path(self._temporary.name)
        try:
            os.makedirs(self._folder, exist_ok=True)
        except OSError as error:
            raise disk_error(self._folder, error) from None
        return self._folder / f"{number:06d}.safetensors"


def nested_map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A nest of tuples, lists and dictionaries with ``change`` applied to every tensor in it.

    >>> import torch
    >>> nested_map({"a": (torch.ones(2), None)}, torch.Tensor.sum)
    {'a': (tensor(2.), None)}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(nested_map(v, change) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(nested_map(v, change) for v in value)
    if isinstance(value, dict):
        return {k: nested_map(v, change) for k, v in value.items()}
    return value
