"""A packed weight without its numbers: what a configuration of files says of it.

Numbers are all zero or all one, and take no memory; forms, shapes, types, groups and whether zero points are in use are those
of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

import weft.packed.around
import weft.packed.forms  # noqa: F401
from weft.packed.form import FORMS, Packed


def describe(packed: Packed) -> dict[str, Any]:
    """The outline of a packed weight as JSON values.

    >>> from weft.packed import Affine
    >>> made = Affine(torch.zeros(2, 4, dtype=torch.int16), torch.ones(2, 2), torch.zeros(2, 2), 4, -8)
    >>> again = outline(describe(made))
    >>> again.shape, again.scale.shape, again.settings() == made.settings()
    ((2, 4), torch.Size([2, 2]), True)
    """
    return {"form": packed.form, **{f.name: _said(getattr(packed, f.name)) for f in fields(packed)}}


def outline(description: Mapping[str, Any]) -> Packed:
    """The packed weight of an outline."""
    values = {name: _meant(value) for name, value in description.items() if name != "form"}
    return FORMS[description["form"]](**values)


def _said(value: Any) -> Any:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return {"tensor": list(value.shape), "dtype": kind, "any": bool(value.float().count_nonzero())}
    if isinstance(value, Packed):
        return describe(value)
    if isinstance(value, tuple):
        return {"tuple": [_said(v) for v in value]}
    return value


def _meant(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "form" in value:
        return outline(value)
    if "tuple" in value:
        return tuple(_meant(v) for v in value["tuple"])
    return torch.full((), float(value["any"])).to(getattr(torch, value["dtype"])).expand(value["tensor"])
