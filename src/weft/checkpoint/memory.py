"""A state dict in memory as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.dtypes import DTYPES, DType, dtype_of
from weft.checkpoint.files import Memory
from weft.checkpoint.header import TensorInfo
from weft.errors import CheckpointError

_FROM_NUMPY = {d.storage: d for d in reversed(DTYPES.values()) if d.name in ("F64", "F32", "F16") or not d.floating}
_FROM_NUMPY |= {"uint8": DTYPES["U8"], "uint16": DTYPES["U16"]}


def from_mapping(state: Mapping[str, Any], name: str = "state dict") -> Checkpoint:
    """Tensors of a state dict (torch or numpy) as a checkpoint; nothing is copied if it is contiguous on the CPU."""
    tensors: dict[str, LazyTensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    values = list(state.items())  # all alive at once: an address then tells tensors apart
    for key, value in values:
        data, dtype, shape, identity = _as_bytes(key, value)
        if identity in seen and data.nbytes:
            aliases[key] = seen[identity]
        seen.setdefault(identity, key)
        info = TensorInfo(key, dtype, shape, 0, data.nbytes)
        tensors[key] = LazyTensor(info, Memory(data.data, key))
    return Checkpoint(name=name, tensors=tensors, aliases=aliases)


def _as_bytes(key: str, value: Any) -> tuple[np.ndarray, DType, tuple[int, ...], tuple[Any, ...]]:
    if isinstance(value, np.ndarray):
        dtype = _FROM_NUMPY.get(value.dtype.name)
        if dtype is None:
            raise CheckpointError(f"{key!r}: numpy type {value.dtype} cannot be stored in a checkpoint.")
        flat = np.ascontiguousarray(value, value.dtype.newbyteorder("=")).reshape(-1)
        identity = (value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.str)
        return flat.view(np.uint8), dtype, value.shape, identity
    if not hasattr(value, "untyped_storage"):
        raise CheckpointError(f"{key!r}: expected a torch or numpy tensor, found {type(value).__name__}.")
    import torch

    if value.is_meta or value.layout is not torch.strided or hasattr(value, "__tensor_flatten__"):
        kind = f"{value.device.type}, {value.layout}, {type(value).__name__}"
        raise CheckpointError(
            f"{key!r}: a tensor without plain bytes ({kind}). Load it, or convert it to a dense tensor first."
        )
    try:
        dtype = dtype_of(str(value.dtype))
    except CheckpointError as error:
        raise CheckpointError(f"{key!r}: {error}") from None
    place: tuple[Any, ...] = (
        value.untyped_storage().data_ptr(),
        value.storage_offset(),
        tuple(value.shape),
        value.stride(),
        value.is_conj() or value.is_neg(),
        dtype.name,
    )
    tensor = value.detach().cpu().resolve_conj().resolve_neg()
    raw = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    shape = tuple(tensor.shape)
    if dtype.bits < 8:  # torch counts pairs, a checkpoint counts elements
        shape = (*shape[:-1], shape[-1] * 2) if shape else (2,)
    return raw.numpy(), dtype, shape, place
