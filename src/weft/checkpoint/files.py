"""Bytes at an offset: from a local file, from memory, or over HTTP.

Weights are never memory-mapped: pages of a mapped file count as resident memory, positioned reads into a
reused buffer do not.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol

from weft.errors import CheckpointError


class ByteSource(Protocol):
    """Random access to bytes; safe to call from several threads."""

    name: str
    size: int

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes that start at ``offset``; raises ``CheckpointError`` if there are too few."""

    def close(self) -> None:
        """Release the file; reading afterwards is an error."""


class LocalFile:
    """A file on this machine, read with ``preadv``."""

    _descriptor = -1
    _close = staticmethod(os.close)  # reachable when the interpreter shuts down and has emptied its modules

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.name = self.path.name
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened ({error.strerror}).") from None
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{self.path}: is not a regular file, so it cannot hold weights.")
        self.size = status.st_size
        self.stamp = f"{status.st_size}:{status.st_mtime_ns}"

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See :class:`ByteSource`."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: reading failed ({error.strerror}).") from None
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ended at byte {offset + done:,} while {len(buffer) - done:,} more were expected. "
                    "The file was truncated while it was being read."
                )
            done += count

    def close(self) -> None:
        """See :class:`ByteSource`."""
        if self._descriptor >= 0:
            self._close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


class Memory:
    """Bytes that are already in memory (a tensor of a state dict)."""

    def __init__(self, data: memoryview, name: str):
        self.name = name
        self._data = data
        self.size = len(data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See :class:`ByteSource`."""
        buffer[:] = self._data[offset : offset + len(buffer)]

    def close(self) -> None:
        """See :class:`ByteSource`."""


def read_bytes(source: ByteSource, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset`` as a new object."""
    buffer = bytearray(length)
    source.read_into(memoryview(buffer), offset)
    return bytes(buffer)
