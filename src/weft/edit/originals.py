"""Go back after an edit, bit for bit: the tensors as they were, and checksums of what they became.

Subtracting a change does not undo it where adding it was rounded. What was there before does, whatever the edit,
the dtype and the values. The checksums refuse to overwrite a model that was changed again since.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from weft.checkpoint.checkpoint import LazyTensor
from weft.checkpoint.memory import from_mapping
from weft.checkpoint.open import open_checkpoint
from weft.checkpoint.save import save_tensors
from weft.engine.chunks import Chunk
from weft.engine.merging import MergeMethod, merge_tensors
from weft.errors import CheckpointError, MissingTensorError, did_you_mean

_KEY = "weft.originals"


@dataclass(frozen=True)
class Restore:
    """Configuration of :func:`restore`: there is nothing to choose."""


def restore(edited: Any, original: Any) -> Any:
    """Put an original back: what the recipe method ``restore`` does to each tensor that was kept.

    In a recipe the edited model is the base, the file with the originals the one model, and ``missing: copy`` takes
    the other tensors from the edited model. Float32, bfloat16 and float16 come back bit for bit; checksums are not
    compared there.

    Args:
        edited: tensor (torch or numpy, any shape) or state dict after the edit.
        original: the same before it.

    Returns:
        The original.

    Raises:
        ShapeError: shapes or names differ.

    Source: none; nothing is computed.

    >>> import numpy as np
    >>> from weft.edit.originals import restore
    >>> restore(np.float32([1, 2]), np.float32([3, 2]))
    array([3., 2.], dtype=float32)
    """
    return merge_tensors(METHODS[0], [original], Restore(), base=edited)


@dataclass(frozen=True, eq=False)
class Originals:
    """What an edit replaced.

    Attributes:
        tensors: the tensors that the edit changed, as they were.
        checksums: of the same tensors as the edit left them.

    >>> import numpy as np
    >>> from weft.edit.originals import Originals
    >>> before, after = {"w": np.float32([1e-8, 2])}, {"w": np.float32([1, 2])}
    >>> Originals.keep(before, after).restore(after)["w"]
    array([1.e-08, 2.e+00], dtype=float32)
    """

    tensors: dict[str, Any]
    checksums: dict[str, str]

    @classmethod
    def keep(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> Originals:
        """Copy the tensors of ``before`` whose bytes, dtype or shape are others in ``after``.

        Args:
            before: state dict (torch or numpy) or checkpoint before the edit.
            after: the same names after it.

        Raises:
            MissingTensorError: ``after`` lacks a tensor.
        """
        old, new = open_checkpoint(before), open_checkpoint(after)
        tensors, checksums = {}, {}
        for name, tensor in old.items():
            checksum = fingerprint(new[name])
            if fingerprint(tensor) != checksum:
                tensors[name] = tensor.bits() if isinstance(before[name], np.ndarray) else tensor.torch()
                checksums[name] = checksum
        return cls(tensors, checksums)

    def restore(self, after: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict before the edit, bit for bit; tensors that the edit left alone are those of ``after``.

        Raises:
            MissingTensorError: ``after`` lacks a tensor that was edited.
            CheckpointError: a tensor is not what the edit made of it.
        """
        for name, checksum in self.checksums.items():
            if name not in after:
                raise MissingTensorError(f"The model has no tensor {name!r}.{did_you_mean(name, after)}")
            if fingerprint(from_mapping({name: after[name]})[name]) != checksum:
                raise CheckpointError(
                    f"{name}: is not what the edit left behind, so restoring it would lose a later change. The model "
                    "was trained or edited since, or is another one; subtract the change instead."
                )
        return with_ties(after, self.tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; raises ``OutputError`` if it exists."""
        save_tensors(path, self.tensors, {_KEY: json.dumps(self.checksums)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Originals:
        """Read what :meth:`save` wrote, as torch tensors; raises ``CheckpointError`` if it is another kind of file."""
        tensors, text = load_tensors(path, _KEY, "kept originals")
        return cls(tensors, text)


def fingerprint(tensor: LazyTensor) -> str:
    """Checksum of a tensor's dtype, shape and bytes."""
    digest = xxhash.xxh3_64(f"{tensor.dtype}{tensor.shape}".encode())
    digest.update(tensor.bits().tobytes())
    return digest.hexdigest()


def with_ties(state: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with ``changed`` tensors in place; names that shared one storage share one again."""
    result = {**state, **changed}
    for alias, name in from_mapping({n: state[n] for n in changed}).aliases.items():
        result[alias] = result[name]
    return result


def load_tensors(path: str | os.PathLike[str], key: str, kind: str) -> tuple[dict[str, Any], Any]:
    """The tensors of a file, and the JSON that stands under ``key`` in its metadata."""
    with open_checkpoint(path) as file:
        if key not in file.metadata:
            raise CheckpointError(f"{path}: holds no {kind} (its metadata lacks {key!r}). Give a file that weft saved.")
        try:
            return {name: tensor.torch() for name, tensor in file.items()}, json.loads(file.metadata[key])
        except ValueError:
            raise CheckpointError(f"{path}: the metadata {key!r} is not JSON. The file is damaged.") from None


def _combine(chunk: Chunk, config: Restore, state: None, out: np.ndarray) -> None:
    np.copyto(out, chunk.tensors[0])


METHODS = (
    MergeMethod(
        name="restore",
        family="edit",
        config=Restore,
        summary="Put tensors that were kept before an edit back into the edited model.",
        goal="edit",
        origin="weft",
        combine=_combine,
        base="required",
        models=(1, 1),
        function=restore,
        checked_by=("closed form",),
    ),
)
