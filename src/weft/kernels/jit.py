"""How loops are compiled: by numba, without the GIL, cached on disk.

The cache lies beside the package, or in the user's cache folder where the package is read-only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def _choose_cache_folder() -> None:
    """Point numba at a folder it can write, before it looks for one itself (it raises if there is none)."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    beside = Path(__file__).parent / "__pycache__"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft" / "numba"
    for folder in (beside, home):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except (OSError, RuntimeError):
            continue
        if folder is not beside:
            os.environ["NUMBA_CACHE_DIR"] = str(folder)
        return
    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="weft-numba-")


_choose_cache_folder()
import numba  # noqa: E402  (it reads the environment when imported)


def kernel(function: F) -> F:
    """Compile a loop whose floating-point operations happen in the order written."""
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


def reduction(function: F) -> F:
    """Compile a loop that sums: additions may be reordered to use vector registers.

    The order is fixed by the compiled code and the array's length, so the result is the same on every run.
    """
    return numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})(function)


def fused(function: F) -> F:
    """Compile a loop in the order written, where a product that is added is rounded once, with the sum (as in BLAS).

    Machines that have no such instruction round twice.
    """
    return numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})(function)


def inline(function: F) -> F:
    """Compile a helper whose body is pasted into the kernels that call it, so that their loops can be vectorised."""
    return numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")(function)
