"""Files of weights written in place: header first, space reserved, tensors at their offsets in any order."""

from __future__ import annotations

import os
from pathlib import Path

from weft.checkpoint.header import Header
from weft.errors import OutputError, disk_error


class ShardWriter:
    """One output file of known layout and ``size``. Writes use ``pwrite``, from any thread."""

    def __init__(self, path: Path, prefix: bytes, header: Header, size: int | None = None):
        self.path = path
        self.prefix = prefix
        self.header = header
        self.size = len(prefix) + sum(t.nbytes for t in header.tensors.values()) if size is None else size
        self._descriptor = -1

    def create(self) -> None:
        """Reserve all space and write the header.

        Raises:
            OutputError: the disk is full; nothing but an empty file is left.
        """
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            os.posix_fallocate(self._descriptor, 0, self.size)
        except OSError as error:
            raise self._error(error) from None
        self.write(self.prefix, 0)

    def reopen(self) -> bool:
        """Open the file of an interrupted run; False if it is not the file that was begun."""
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        same = os.fstat(self._descriptor).st_size == self.size
        return same and os.pread(self._descriptor, len(self.prefix), 0) == self.prefix

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._descriptor, view[done:], offset + done)
            except OSError as error:
                raise self._error(error) from None

    def sync(self) -> None:
        """Make what was written durable."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._error(error) from None

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _error(self, error: OSError) -> OutputError:
        return disk_error(self.path, error, self.size)
