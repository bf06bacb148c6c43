"""Compiled loops over arrays: conversions, reductions, selection, random streams, codes of few bits.

Everything here works on numpy arrays, releases the GIL, and needs no torch. Start at :mod:`weft.kernels.convert`. Files
that are called ``torch_…`` and ``triton_…`` are the exceptions: products with packed matrices on tensors.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec


@cache
def triton_ready() -> bool:
    """Whether kernels of Triton can run: it is installed, and there is a GPU of CUDA or its interpreter is asked for."""
    if find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    import torch

    return torch.cuda.is_available() and torch.version.hip is None
