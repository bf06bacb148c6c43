"""Recognise files that hold the parts of weight functions where weights should be."""

from __future__ import annotations

import re
from collections.abc import Iterable

from weft.errors import CheckpointError

# torch's own weight norm, which published speech models carry, stores original0 and original1
_STORED = re.compile(r"(?:^|\.)parametrizations\.[^.]+\.original$")


def refuse_unbaked(names: Iterable[str], where: str = "The state dict") -> None:
    """Raise an error if tensors are the parts of functions instead of weights.

    Args:
        names: all tensor names.
        where: what holds them, for the message.

    Raises:
        CheckpointError: it was saved from a model with functions attached.

    >>> refuse_unbaked(["layer.weight", "conv.parametrizations.weight.original0"])
    >>> refuse_unbaked(["layer.parametrizations.weight.original"])
    Traceback (most recent call last):
    weft.errors.CheckpointError: The state dict holds 'layer.parametrizations.weight.original': ...
    """
    found = next((n for n in names if _STORED.search(n)), None)
    if found is not None:
        raise CheckpointError(
            f"{where} holds {found!r}: it was saved from a model with functions on its weights, and loading it as a "
            "plain model would leave those layers at random values. Load it into a model with the same functions "
            "attached, and write that with weft.save, or with save_pretrained after weft.bake_."
        )
