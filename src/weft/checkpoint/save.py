"""Write a few tensors that are in memory (a patch, statistics) as one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.checkpoint.header import build_header
from weft.checkpoint.memory import from_mapping
from weft.errors import OutputError, disk_error


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write torch or numpy ``tensors`` with string ``metadata``; the file appears complete or not at all.

    Raises:
        OutputError: the file exists, or cannot be written.

    >>> import numpy as np, tempfile, weft
    >>> path = f"{tempfile.mkdtemp()}/patch.safetensors"
    >>> save_tensors(path, {"w": np.float32([1, 2])}, {"made by": "an example"})
    >>> with weft.open(path) as file:
    ...     file["w"].numpy(), file.metadata["made by"]
    (array([1., 2.], dtype=float32), 'an example')
    """
    target = Path(path)
    if target.exists():
        raise OutputError(f"{target}: exists already. Choose another name, or remove it first.")
    opened = from_mapping(tensors)
    prefix, header = build_header(((name, t.dtype, t.shape) for name, t in opened.items()), metadata)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(prefix)
            for name in header.tensors:
                file.write(opened[name].bits().tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise disk_error(target, error, len(prefix) + sum(t.nbytes for t in opened.values())) from None
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: str | os.PathLike[str]) -> None:
    """Remove what :func:`save_tensors` left in a folder when it was killed; nothing else may be writing there.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / ".patch.safetensors.123.partial").touch()
    >>> remove_partial(folder)
    >>> list(folder.iterdir())
    []
    """
    for path in Path(folder).glob(".*.safetensors.*.partial"):
        path.unlink(missing_ok=True)
