"""Quantised models: plain weights that are computed when they are read, in the place of the packed tensors.

One matrix at a time is unpacked, and each thread keeps the last one until it has been read to its end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.dtypes import DTYPES, DType, dtype_of
from weft.checkpoint.folder import natural_key, read_json
from weft.checkpoint.header import TensorInfo
from weft.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from weft.packed.form import Packed

KEY = "quantization_config"
_BESIDE = "quantize_config.json"  # where older GPTQ models say it
_MOST = 4096  # weights that a byte can stand for: one index of eight bits into vectors of any real length
_FLOATS = ("BF16", "F16", "F32", "F64")


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose packed layers are plain tensors, if its configuration says that it has any.

    The checkpoint is changed and returned: packed tensors make room for float32 tensors that are computed when read (of the
    model's type when written), ``config`` loses its ``quantization_config``, and ``packed`` gives the packed weights.

    Raises:
        CheckpointError: the format is not known, or tensors are missing or do not fit together.
    """
    settings = _settings(checkpoint)
    if settings is None:
        return checkpoint
    from weft.packed.formats import read_with

    try:
        form = read_with(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from None
    files = checkpoint.tensors
    layers = form.layers(files, settings)
    stored = _stored(checkpoint, {name for parts in layers.values() for name in parts})
    shapes = {name: tensor.shape for name, tensor in files.items()}
    scratch = _Scratch()
    plain: dict[str, LazyTensor] = {}
    packed: dict[str, Callable[[], Packed]] = {}

    def get(name: str) -> torch.Tensor:
        if name not in files:
            raise KeyError(name)
        return files[name].torch()

    for layer, parts in layers.items():

        def load(layer: str = layer) -> Packed:
            return form.read(layer, get, settings)

        name = form.plain_name(layer)
        try:
            shape = form.shape(layer, shapes, get, settings)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.name}: {error}") from None
        nbytes = sum(files[part].nbytes for part in parts)
        if math.prod(shape) > _MOST * nbytes:
            raise CheckpointError(
                f"{checkpoint.name}: {name} is said to be {list(shape)}, which its {nbytes:,} packed bytes cannot hold. The file is "
                "damaged or hostile; do not use it."
            )
        if name in files and name not in parts:
            raise CheckpointError(f"{checkpoint.name}: has {name} packed, and plain too. Remove one of them.")

        def values(load: Callable[[], Packed] = load, shape: tuple[int, ...] = shape, name: str = name) -> np.ndarray:
            made = form.plain(load().dequantize(), shape)
            if tuple(made.shape) != shape:
                raise CheckpointError(f"{checkpoint.name}: {name} is {list(made.shape)} and should be {list(shape)}.")
            return made.contiguous().numpy()

        source = _Dequantized(name, math.prod(shape) * 4, values, [files[part] for part in parts], scratch)
        info = TensorInfo(name, DTYPES["F32"], shape, 0, source.size)
        plain[name] = LazyTensor(info, source, stored)
        packed[layer] = load
    gone = {name for parts in layers.values() for name in parts}
    kept = {name: tensor for name, tensor in files.items() if name not in gone}
    checkpoint.tensors = dict(sorted({**kept, **plain}.items(), key=lambda item: natural_key(item[0])))
    checkpoint.config = {key: value for key, value in checkpoint.config.items() if key != KEY}
    checkpoint.packed = packed
    if checkpoint.fingerprint:  # the same bytes with other settings are other weights
        said = json.dumps(settings, sort_keys=True, default=str).encode()
        checkpoint.fingerprint += f"|{KEY}:{xxhash.xxh3_64_hexdigest(said)}"
    return checkpoint


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    settings = checkpoint.config.get(KEY)
    if settings is None and any(name.endswith(".qweight") for name in checkpoint.tensors):
        if checkpoint.folder is None or not (checkpoint.folder / _BESIDE).is_file():
            return None
        settings = {"quant_method": "gptq", **read_json(checkpoint.folder / _BESIDE)}
    if settings is not None and not isinstance(settings, Mapping):
        raise CheckpointError(f"{checkpoint.name}: its {KEY} is {settings!r:.80}, and should be a JSON object.")
    return settings or None


def _stored(checkpoint: Checkpoint, packed: set[str]) -> DType:
    """The type of the plain model: what its configuration says, else that of most of its other tensors."""
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, Mapping) else {}):
        named = config.get("dtype") or config.get("torch_dtype")
        if isinstance(named, str) and named.removeprefix("torch.") in ("bfloat16", "float16", "float32", "float64"):
            return dtype_of(named)
    others = Counter(t.dtype.name for n, t in checkpoint.items() if n not in packed and t.dtype.name in _FLOATS)
    return DTYPES[others.most_common(1)[0][0]] if others else DTYPES["F32"]


class _Scratch(threading.local):
    """The last matrix of a thread, and whose it is."""

    owner: object = None
    values = np.empty(0, np.uint8)


@dataclasses.dataclass
class _Dequantized:
    """The bytes of a dequantised weight in float32."""

    name: str
    size: int
    values: Callable[[], np.ndarray]
    parts: list[LazyTensor]
    scratch: _Scratch

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        target = np.frombuffer(buffer, np.uint8)
        if offset + target.size > self.size:
            raise CheckpointError(
                f"{self.name}: read beyond its end ({offset + target.size:,} of {self.size:,} bytes)."
            )
        scratch = self.scratch
        if scratch.owner is not self:
            scratch.owner, scratch.values = None, np.empty(0, np.uint8)  # never two at once
            scratch.values = self.values().reshape(-1).view(np.uint8)
            scratch.owner = self
        target[:] = scratch.values[offset : offset + target.size]
        if offset + target.size == self.size:
            scratch.owner, scratch.values = None, np.empty(0, np.uint8)

    def close(self) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        self.scratch.owner, self.scratch.values = None, np.empty(0, np.uint8)
        for part in self.parts:
            part.source.close()
