"""Progress of a run: a bar on a terminal, plain lines elsewhere, silence for runs under two seconds."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, TextIO

_QUIET_SECONDS = 2.0
_LINE_SECONDS = 5.0


class Progress:
    """Counts bytes and tensors; safe to call from several threads. This base class is silent."""

    def start(self, label: str, tensors: int, nbytes: int, unit: str = "tensors") -> None:
        """A stage of ``tensors`` tensors and ``nbytes`` bytes begins; other units have no bytes: give their number twice."""

    def advance(self, name: str, nbytes: int) -> None:
        """Tensor ``name`` is done."""

    def finish(self) -> None:
        """The run is over."""


class TextProgress(Progress):
    """Writes to a stream: one line that is rewritten on a terminal, a line every few seconds elsewhere."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._lock = threading.Lock()
        self._label, self._tensors, self._nbytes, self._unit = "", 0, 0, "tensors"
        self._done_tensors = self._done_bytes = 0
        self._began = time.monotonic()
        self._stage_began = self._shown = self._began
        self._width = 0

    def start(self, label: str, tensors: int, nbytes: int, unit: str = "tensors") -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._label, self._tensors, self._nbytes, self._unit = label, tensors, max(nbytes, 1), unit
            self._done_tensors = self._done_bytes = 0
            self._stage_began = time.monotonic()

    def advance(self, name: str, nbytes: int) -> None:
        """See :class:`Progress`."""
        with self._lock:
            self._done_tensors += 1
            self._done_bytes += nbytes
            now = time.monotonic()
            every = 0.1 if self._terminal else _LINE_SECONDS
            if now - self._began < _QUIET_SECONDS or now - self._shown < every:
                return
            self._shown = now
            self._write(self._line(name, now))

    def finish(self) -> None:
        """See :class:`Progress`."""
        with self._lock:
            if self._terminal and self._width:
                self._stream.write("\r" + " " * self._width + "\r")
                self._stream.flush()

    def _line(self, name: str, now: float) -> str:
        seconds = max(now - self._stage_began, 1e-6)
        rate = self._done_bytes / seconds
        left = (self._nbytes - self._done_bytes) / rate if rate else 0.0
        share = 100 * self._done_bytes / self._nbytes
        speed = f"{rate / 1e6:,.0f} MB/s  " if self._unit == "tensors" else ""
        done = f"{self._done_tensors}/{self._tensors} {self._unit}"
        return f"{self._label} {share:3.0f}%  {done}  {speed}{left:,.0f} s left  {name}"

    def _write(self, line: str) -> None:
        if self._terminal:
            line = line[:118]
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def default_progress(quiet: bool = False, **_: Any) -> Progress:
    """What the command line uses."""
    return Progress() if quiet else TextProgress()
