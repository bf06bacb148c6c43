"""What survives a kill: a locked work folder and a record of the tensors that are safely on disk.

``OUT.partial/`` holds ``lock``, ``journal`` and ``files/``. When everything is written and verified, ``files`` is
renamed to ``OUT`` in one step and the work folder is removed. ``publishing`` says that this was begun; ``replaced`` is an
older ``OUT``, which gets its name back if a kill fell between the two renames.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.errors import OutputError, disk_error


class WorkFolder:
    """The folder in which an output comes to be."""

    def __init__(self, output: Path):
        self.output = output
        self.root = output.with_name(output.name + ".partial")
        self.files = self.root / "files"
        self.identity = ""  # of the run, for whoever finds what a kill left
        self._replaced = self.root / "replaced"
        self._publishing = self.root / "publishing"
        self._journal_path = self.root / "journal"
        self._lock: int | None = None
        self._journal: int | None = None

    def acquire(self) -> None:
        """Create the folder and take its lock.

        Raises:
            OutputError: another run holds the lock, or the folder cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise disk_error(self.root, error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise OutputError(
                f"{self.output}: another run is writing this output. Wait for it, or choose another output."
            ) from None
        if not (self.root / "lock").exists():  # the other run finished and removed the folder before we had the lock
            self.release()
            self.acquire()
            return
        if self._replaced.exists() and not self.output.exists():  # killed between two renames
            os.rename(self._replaced, self.output)
        if self.published:
            self._clear()
        self._publishing.unlink(missing_ok=True)

    def tidy(self) -> str | None:
        """Remove what is left of a run that had given the output its name, and was killed before it removed its folder.

        Returns:
            The identity of that run; None if there is none.
        """
        if not self.published:
            if self.output.exists() and self.root.is_dir() and {p.name for p in self.root.iterdir()} <= {"lock"}:
                self.acquire()
                self.remove()
            return None
        found = self._publishing.read_text(encoding="utf-8")
        self.acquire()
        self.remove()
        return found

    @property
    def published(self) -> bool:
        """Whether there is a rest of a run that :meth:`tidy` would remove."""
        done = self._publishing.is_file() and self.output.exists()
        return done and not (self.files.is_dir() and any(self.files.iterdir()))

    def _clear(self) -> None:
        """Delete all but the lock and the word that the output has its name, which goes last."""
        for path in self.root.iterdir() if self.root.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in ("lock", self._publishing.name):
                path.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the lock back."""
        for descriptor in (self._journal, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._journal = self._lock = None

    def remove(self) -> None:
        """Delete everything of this run, then give the lock back."""
        self._clear()
        shutil.rmtree(self.root, ignore_errors=True)
        self.release()

    def read(self) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The identity of the interrupted run and its finished tensors with their checksums."""
        try:
            lines = self._journal_path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None, {}
        records = []
        for line in lines[:-1]:  # what follows the last newline was cut off by the kill
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        if not records or "identity" not in records[0]:
            return None, {}
        return records[0]["identity"], {r["name"]: r["xxh3"] for r in records[1:]}

    def begin(self, identity: Mapping[str, Any] | None) -> None:
        """Open the journal: a new one for ``identity``, or the old one (None) to append to."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if identity is None else os.O_TRUNC)
        if identity is None:
            text = self._journal_path.read_bytes()
            os.truncate(self._journal_path, text.rfind(b"\n") + 1)
        self._journal = os.open(self._journal_path, flags, 0o644)
        if identity is not None:
            self._append([{"identity": dict(identity)}])

    def record(self, finished: Mapping[str, str]) -> None:
        """Note tensors whose bytes are synced."""
        self._append([{"name": name, "xxh3": digest} for name, digest in finished.items()])

    def _append(self, records: list[dict[str, Any]]) -> None:
        assert self._journal is not None
        os.write(self._journal, b"".join(json.dumps(r, sort_keys=True).encode() + b"\n" for r in records))
        os.fdatasync(self._journal)

    def publish(self, force: bool, single_file: bool) -> None:
        """Give the finished files their final name, in one step, and remove the work folder."""
        made = self.files
        if single_file:
            made = next(self.files.iterdir())
        sync_folder(self.files)
        try:
            self._publishing.write_text(self.identity, encoding="utf-8")
            if self.output.exists() or self.output.is_symlink():
                if not force:
                    raise OutputError(f"{self.output}: appeared while this run was working; it is left as it is.")
                os.rename(self.output, self._replaced)
            os.rename(made, self.output)
            sync_folder(self.output.parent)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise disk_error(self.output, error) from None
        self.remove()


def sync_folder(folder: Path) -> None:
    """Make renames and new files in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
