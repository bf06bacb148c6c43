"""Sizes as people write them."""

from __future__ import annotations

from weft.errors import RecipeError


def parse_size(size: str | int) -> int:
    """Bytes from a number or a text such as ``5GB``, ``512MiB``.

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size(10)
    (5000000000, 1572864, 10)
    """
    if isinstance(size, int):
        value = size
    else:
        text = size.strip().upper().removesuffix("B")
        factor = 1
        for suffix, power in (
            ("KI", 2**10),
            ("MI", 2**20),
            ("GI", 2**30),
            ("TI", 2**40),
            ("K", 10**3),
            ("M", 10**6),
            ("G", 10**9),
            ("T", 10**12),
        ):
            if text.endswith(suffix):
                text, factor = text.removesuffix(suffix), power
                break
        try:
            value = int(float(text) * factor)
        except ValueError:
            raise RecipeError(f"{size!r} is not a size; write it like 5GB or 512MiB.") from None
    if value <= 0:
        raise RecipeError(f"A size must be positive, got {size!r}.")
    return value
