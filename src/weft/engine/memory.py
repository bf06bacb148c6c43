"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library than glibc, which keeps no such rests
        return None
    return function


def give_back() -> None:
    """Give pages that hold nothing back: glibc keeps those between large tensors that came and went, block after block.

    >>> give_back()
    """
    trim = _trim()
    if trim is not None:
        trim(0)
