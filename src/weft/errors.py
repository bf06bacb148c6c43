"""What can go wrong, sorted by what the user has to do about it.

Every message states four things: what must hold, what was found, the likely cause and the fix.
Everything that weft raises on purpose is a :class:`WeftError`; the command line prints these
without a traceback and exits with the class's ``exit_code``.
"""

from __future__ import annotations

import difflib
import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class WeftError(Exception):
    """Base of all errors that weft raises on purpose."""

    exit_code = 1


class RecipeError(WeftError, ValueError):
    """The request is wrong (a name, a parameter, a combination): change the recipe or the options."""

    exit_code = 2


class CheckpointError(WeftError, ValueError):
    """An input file is damaged, unsafe or not what it claims to be: repair or replace the file."""

    exit_code = 3


class MissingTensorError(CheckpointError, KeyError):
    """A tensor that is needed is not in the checkpoint: check names, or choose a policy for missing tensors."""

    def __str__(self) -> str:  # KeyError would quote the message
        return str(self.args[0]) if self.args else ""


class ShapeError(CheckpointError):
    """Tensors that must have one shape do not: the models have different architectures or vocabularies."""


class NonFiniteError(CheckpointError):
    """An input tensor holds NaN or infinity: repair the input, or allow it explicitly."""


class OutputError(WeftError, OSError):
    """The output cannot be written as asked (it exists, is locked, belongs to another run, or the disk is full)."""

    exit_code = 4

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class VerificationError(WeftError):
    """What was made is not what it should be, and was not published: look at the inputs, or widen the limit."""

    exit_code = 6


class MissingDependencyError(WeftError, ImportError):
    """An optional package is needed: install the extra that the message names."""

    exit_code = 5


def disk_error(path: Any, error: OSError, nbytes: int = 0) -> OutputError:
    """What to say of a file or folder that cannot be written: what is needed where it lies, if the disk is full.

    >>> import errno
    >>> str(disk_error("/out/a.safetensors", OSError(errno.EACCES, "Permission denied")))
    '/out/a.safetensors: cannot be written (Permission denied). Choose another output.'
    >>> print(str(disk_error("/out/a.safetensors", OSError(errno.ENOSPC, "No space left on device"), 5000)).partition(";")[0])
    /out/a.safetensors: there is no room for its 5,000 bytes (No space left on device
    """
    if error.errno not in _FULL:
        return OutputError(f"{path}: cannot be written ({error.strerror or error}). Choose another output.")
    free = ""
    for folder in Path(path).absolute().parents:
        try:
            free = f"; {folder} has {shutil.disk_usage(folder).free:,} free"
            break
        except OSError:
            continue
    room = f"its {nbytes:,} bytes" if nbytes else "it"
    return OutputError(
        f"{path}: there is no room for {room} ({error.strerror}{free}). Free space and run the same command again: it goes on "
        "where it was; or choose another output."
    )


@contextmanager
def disk_errors(path: Any) -> Iterator[None]:
    """Around what writes beneath a path: errors of the disk become :class:`OutputError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, WeftError) or error.errno not in _DISK:
            raise
        raise disk_error(error.filename or path, error) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known names, to append to an error message.

    >>> did_you_mean("tias", ["ties", "slerp"])
    ' Did you mean ties?'
    >>> did_you_mean("zzz", ["ties", "slerp"])
    ' Known: slerp, ties.'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.55)
    if not close:
        folded = {n.lower().replace("-", "_"): n for n in names}
        close = [folded[c] for c in difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=3, cutoff=0.55)]
    if close:
        return f" Did you mean {' or '.join(close)}?"
    shown = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
    return f" Known: {shown}." if names else ""
