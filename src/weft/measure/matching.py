"""Which tensors of two models can be held against each other."""

from __future__ import annotations

import fnmatch

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.errors import RecipeError


def choose(a: Checkpoint, b: Checkpoint, pattern: str | None) -> tuple[list[str], list[str], list[str]]:
    """Names only in ``a``, in both, only in ``b``; a name that is tied in every model that has it is left out."""
    names = [
        name
        for name in dict.fromkeys([*a, *b])
        if (name in a and name not in a.aliases) or (name in b and name not in b.aliases)
    ]
    shared = [name for name in names if name in a and name in b]
    if not shared:
        raise RecipeError(
            f"{a.name} and {b.name} have no tensor name in common, so there is nothing to compare. "
            f"The first has {', '.join(list(a)[:2])} …, the second {', '.join(list(b)[:2])} …. "
            "They are of different architectures, or one was saved with a prefix or by another library; "
            "convert or rename one of them first."
        )
    if pattern is not None:
        names = fnmatch.filter(names, pattern)
        shared = [name for name in names if name in a and name in b]
        if not shared:
            raise RecipeError(
                f"None of the tensors that {a.name} and {b.name} share matches {pattern!r} (* stands for any text)."
            )
    return [n for n in names if n not in b], shared, [n for n in names if n not in a]


def comparable(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether one shape, and one type or two floating-point ones, let elements be held against each other."""
    return a.shape == b.shape and (a.dtype is b.dtype or (a.dtype.floating and b.dtype.floating))


def describe(tensor: LazyTensor) -> str:
    """Type and shape: ``F32 [3, 4]``."""
    return f"{tensor.dtype.name} {list(tensor.shape)}"
