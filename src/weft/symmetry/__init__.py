"""Which axes of which tensors of a model may be permuted together without changing its function.

Start with :func:`find_symmetry`; what it returns, a :class:`Symmetry`, permutes (``apply``), draws, inverts and composes
permutations, and says what to keep of each tensor when units are removed (``cut``). Applying needs numpy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.symmetry.apply import Cut
from weft.symmetry.groups import Frozen, Group, Loop, Member, Symmetry

if TYPE_CHECKING:
    from weft.symmetry.find import find_symmetry as find_symmetry

__all__ = ["Cut", "Frozen", "Group", "Loop", "Member", "Symmetry", "find_symmetry"]


def __getattr__(name: str) -> Any:
    if name != "find_symmetry":  # the only one that needs torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from weft.symmetry.find import find_symmetry

    return find_symmetry
