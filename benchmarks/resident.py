"""How much memory a benchmark's own process takes, looked at from a thread beside it."""

from __future__ import annotations

import threading
import time
from pathlib import Path


class Memory(threading.Thread):
    """The largest resident memory without pages of files, looked at every 20 ms from ``start()`` on.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.peak = max(self.peak, sum(int(lines[k].split()[0]) * 1024 for k in ("RssAnon", "RssShmem")))
            time.sleep(0.02)
