"""Quantised models: plain weights that are computed when they are read, in the place of the packed tensors.

One matrix at a time is unpacked. Each thread keeps the codes of the one that it reads (a byte or two for a weight), and
computes its weights in blocks of rows; forms without rows are kept as float32.
"""

from __future__ import annotations

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
_ROWS = 128  # a block's rows are a multiple: blocks of scales are as high
_BLOCK = 1 << 22  # weights in a block
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

    label = checkpoint.name
    try:
        form = read_with(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from None
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
            try:
                return form.read(layer, get, settings)
            except CheckpointError as error:
                raise CheckpointError(f"{label}: {error}") from None

        name = form.plain_name(layer)
        try:
            shape = form.shape(layer, shapes, get, settings)
        except CheckpointError as error:
            raise CheckpointError(f"{label}: {error}") from None
        nbytes = sum(files[part].nbytes for part in parts)
        if math.prod(shape) > _MOST * nbytes:
            raise CheckpointError(
                f"{label}: {name} is said to be {list(shape)}, which its {nbytes:,} packed bytes cannot hold. The file is "
                "damaged or hostile; do not use it."
            )
        if name in files and name not in parts:
            raise CheckpointError(f"{label}: has {name} packed, and plain too. Remove one of them.")
        source = _Dequantized(name, shape, load, form.plain, [files[part] for part in parts], scratch)
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
    """What a thread keeps between reads: a packed matrix, and the rows of it that it saw last."""

    owner: object = None
    packed: Packed | None = None
    number = -1
    values = np.empty(0, np.uint8)

    def forget(self) -> None:
        """Let go of everything."""
        self.owner, self.packed, self.number, self.values = None, None, -1, np.empty(0, np.uint8)


_UNPACKING = threading.Lock()  # a matrix takes several times its size while it is unpacked: one at a time


class _Dequantized:
    """The bytes of a dequantised weight in float32, computed in blocks of rows where its form has rows."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        load: Callable[[], Packed],
        plain: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor],
        parts: list[LazyTensor],
        scratch: _Scratch,
    ):
        self.name, self.shape, self.size = name, shape, math.prod(shape) * 4
        self._load, self._plain, self._parts, self._scratch = load, plain, parts, scratch
        width = math.prod(shape[1:])
        rows = max(_ROWS, _BLOCK // width // _ROWS * _ROWS) if len(shape) == 2 else shape[0]
        self._rows, self._step = rows, rows * width * 4

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        target = np.frombuffer(buffer, np.uint8)
        if offset + target.size > self.size:
            raise CheckpointError(
                f"{self.name}: read beyond its end ({offset + target.size:,} of {self.size:,} bytes)."
            )
        done = 0
        while done < target.size:
            number, within = divmod(offset + done, self._step)
            block = self._block(number)
            count = min(target.size - done, block.size - within)
            target[done : done + count] = block[within : within + count]
            done += count
        if offset + target.size == self.size:
            self._scratch.forget()

    def _block(self, number: int) -> np.ndarray:
        scratch = self._scratch
        if scratch.owner is not self:
            scratch.forget()
            with _UNPACKING:
                packed = self._load()
                whole = self._step >= self.size or packed.part(self._rows, self._rows + 1) is None
                if whole:
                    scratch.values = self._values(packed, self.shape)
            scratch.owner, scratch.packed = self, None if whole else packed
        if scratch.packed is None:
            return scratch.values[number * self._step : (number + 1) * self._step]
        if scratch.number != number:
            scratch.number = -1
            first = number * self._rows
            last = min(first + self._rows, self.shape[0])
            part = scratch.packed.part(first, last)
            assert part is not None
            scratch.values, scratch.number = self._values(part, (last - first, self.shape[1])), number
        return scratch.values

    def _values(self, packed: Packed, shape: tuple[int, ...]) -> np.ndarray:
        made = self._plain(packed.dequantize(), shape)
        if tuple(made.shape) != shape:
            raise CheckpointError(f"{self.name}: {list(made.shape)} is packed where {list(shape)} should be.")
        return made.contiguous().numpy().reshape(-1).view(np.uint8)

    def close(self) -> None:
        """See :class:`weft.checkpoint.files.ByteSource`."""
        self._scratch.forget()
        for part in self._parts:
            part.source.close()
