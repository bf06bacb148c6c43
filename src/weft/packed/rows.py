"""Some rows of a packed matrix, from the tensors that files and layers hold, without unpacking the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from weft.packed.around import Activations
from weft.packed.form import Packed, unpack
from weft.packed.forms import Affine, Minifloat
from weft.packed.levels import NESTED, dynamic_map, minifloat_levels

Parts: TypeAlias = tuple[dict[str, Tensor], dict[str, Any]]
Rows: TypeAlias = slice | Tensor


def inside(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Parts:
    """Tensors and settings of the form that another is put around.

    >>> inside({"inner_codes": torch.zeros(1), "left": torch.zeros(1)}, {"form": "low-rank", "inner": {"form": "affine"}})
    ({'codes': tensor([0.])}, {'form': 'affine'})
    """
    kept = {name.removeprefix("inner_"): t for name, t in tensors.items() if name.startswith("inner_")}
    return kept, settings["inner"]


def some_rows(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], rows: Rows) -> Parts | None:
    """Tensors and settings of a packed matrix of some of the rows.

    Args:
        tensors, settings: of a packed matrix.
        rows: a slice, or (n,) int64 on the tensors' device; rows may repeat.

    Returns:
        Those of the smaller matrix; None where rows share what says them, as those of a transposed matrix do.
    """
    form, made = settings["form"], dict(tensors)
    if form == "affine":
        return {name: t[rows] for name, t in tensors.items()}, dict(settings)
    if form in ("minifloat", "binary"):
        block = tuple(settings["block"])
        if form == "minifloat":
            made["codes"] = tensors["codes"][rows]
            made["scale"] = tensors["scale"][_numbers(tensors["codes"], rows) // block[0]]
        else:
            made["signs"] = tensors["signs"][:, rows]
            made["alpha"] = tensors["alpha"][:, _numbers(tensors["signs"][0], rows) // block[0]]
        return made, {**settings, "block": [1, block[1]]}
    if form == "vectors":
        shared = [name for name in tensors if name.startswith("codebook_")]
        return {name: t if name in shared else t[rows] for name, t in tensors.items()}, dict(settings)
    if form == "lookup":
        return _lookup(tensors, settings, rows)
    if form in ("low-rank", "activations"):
        part = some_rows(*inside(tensors, settings), rows)
        if part is None:
            return None
        made = {name: t for name, t in tensors.items() if not name.startswith("inner_")}
        if form == "low-rank":
            made["left"] = tensors["left"][rows]
        return {**made, **{f"inner_{name}": t for name, t in part[0].items()}}, {**settings, "inner": part[1]}
    return None


def dequantize(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], rows: Rows | None = None, room: Tensor | None = None
) -> Tensor:
    """The matrix of a packed weight's tensors, or some of its rows: (rows, in) float32.

    The same bits as ``unpack(tensors, settings).dequantize()``; a compiled loop makes those of grids on a CPU. ``room``,
    contiguous and of the result's shape, may become the result.
    """
    if rows is not None:
        part = some_rows(tensors, settings, rows)
        if part is None:
            return dequantize(tensors, settings)[rows]
        tensors, settings = part
    form = settings["form"]
    if "nested_scale" in tensors:  # the plain scales of all rows, where rows stand for themselves
        part = some_rows(tensors, settings, slice(0, len(tensors["codes"])))
        tensors, settings = part or (tensors, settings)
    if form == "activations":
        return dequantize(*inside(tensors, settings), room=room)
    if form == "transposed":
        return dequantize(*inside(tensors, settings)).T.contiguous()
    if form == "low-rank":
        return dequantize(*inside(tensors, settings)) + tensors["left"].float() @ tensors["right"].float()
    if form in ("affine", "lookup", "minifloat") and tensors["codes"].device.type == "cpu":
        made = (_affine if form == "affine" else _table)(tensors, settings, room)
        if made is not None:
            return made
    return unpack(tensors, settings).dequantize()


def _table(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], room: Tensor | None) -> Tensor | None:
    """A grid of tiny floats or a table of levels, where a row divides into blocks."""
    from weft.kernels.unpack import lookup

    codes, scale, columns = tensors["codes"], tensors["scale"].float(), int(settings["columns"])
    if settings["form"] == "minifloat":
        table, size = minifloat_levels(str(settings["kind"])), int(settings["block"][1])
        if "global_scale" in tensors:
            scale = (scale.double() * tensors["global_scale"].double()).float()
        scale = scale.repeat_interleave(int(settings["block"][0]), 0)[: len(codes)]
        bits = (len(table) - 1).bit_length()
        codes = codes.view(torch.uint8) if bits == 8 else codes
    else:
        table, size = tensors["levels"][0].float(), int(settings["block_size"])
        bits = max(1, (tensors["levels"].shape[1] - 1).bit_length())
        if "table" in tensors or "nested_scale" in tensors or columns % size:
            return None
        scale = scale.view(len(codes), -1)
        table = functional.pad(table, (0, (1 << bits) - len(table)))  # of damaged files, codes may be beyond the levels
    made = torch.empty(len(codes), columns) if room is None else room
    words, levels, s = (t.contiguous().numpy() for t in (codes, table, scale))
    lookup(words, bits, levels, s, size, made.numpy())
    return made


def _affine(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], room: Tensor | None) -> Tensor:
    from weft.kernels.unpack import affine

    codes, scale, zero, low = tensors["codes"], tensors["scale"], tensors.get("zero"), int(settings["low"])
    if zero is None:
        zero = torch.zeros_like(scale)
    wide = zero.float() + low if zero.dtype == torch.uint8 else zero.float()
    made = torch.empty(len(codes), int(settings["columns"])) if room is None else room
    words, s, z = (t.contiguous().numpy() for t in (codes, scale.float(), wide))
    affine(words, int(settings["bits"]), low, s, z, made.numpy())
    return made


def _lookup(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], rows: Rows) -> Parts | None:
    columns, size = int(settings["columns"]), int(settings["block_size"])
    made = {"codes": tensors["codes"][rows], "levels": tensors["levels"]}
    if "table" in tensors:
        made["table"] = tensors["table"][rows]
    numbers = _numbers(tensors["codes"], rows)
    if columns % size == 0:
        count = columns // size
        blocks = (numbers.unsqueeze(1) * count + torch.arange(count, device=numbers.device)).flatten()
    elif size % columns == 0:
        blocks, size = numbers // (size // columns), columns
    else:
        return None
    scale = tensors["scale"][blocks]
    if "nested_scale" in tensors:
        values = dynamic_map().to(scale.device)[scale.long()]
        scale = values * tensors["nested_scale"][blocks // NESTED] + tensors["mean"]
    return {**made, "scale": scale}, {**settings, "block_size": size}


def _numbers(table: Tensor, rows: Rows) -> Tensor:
    if isinstance(rows, Tensor):
        return rows
    return torch.arange(*rows.indices(len(table)), device=table.device)


def join_rows(parts: Sequence[Packed]) -> Packed | None:
    """One packed weight over the rows of several; None where they are of forms that share what says their rows.

    >>> from weft.packed import Affine
    >>> one = Affine(torch.ones(1, 2, dtype=torch.int16), torch.ones(1, 1), torch.zeros(1, 1), 4, 0)
    >>> join_rows([one, one]).shape
    (2, 2)
    """
    first = parts[0]
    if any(type(p) is not type(first) or p.shape[1] != first.shape[1] for p in parts):
        return None
    if isinstance(first, Activations):
        inner = join_rows([p.inner for p in parts if isinstance(p, Activations)])
        same = all(
            replace(p, inner=first.inner).settings() == first.settings() for p in parts if isinstance(p, Activations)
        )
        return replace(first, inner=inner) if inner is not None and same and first.input_scale is None else None
    settings = [{k: v for k, v in p.settings().items() if k != "shape"} for p in parts]
    by_row = isinstance(first, Affine) or (
        isinstance(first, Minifloat) and first.block[0] == 1 and first.global_scale is None
    )
    if not by_row or any(s != settings[0] for s in settings):
        return None
    names = [f.name for f in fields(first) if isinstance(getattr(first, f.name), Tensor)]
    if any(getattr(p, n).shape[1] != getattr(first, n).shape[1] for p in parts for n in names):
        return None
    return replace(first, **{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
