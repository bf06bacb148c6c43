"""Recognise a base: a few bytes for each of its tensors, the same in whichever precision it was loaded.

A tensor's fingerprint is two xxh3 digests, of up to 65,536 of its values from sixteen places, once rounded to bfloat16
and once to float16. A model that was loaded in half precision has one of these in common with its float32 files, and a
fine-tune, which moves nearly every value, has neither. It is no seal against changes made on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.dtypes import DTYPES, DType, dtype_of
from weft.checkpoint.folder import read_json
from weft.checkpoint.live_names import live_names
from weft.errors import CheckpointError
from weft.kernels.convert import OUTPUT_DTYPES, from_float32, to_float32

if TYPE_CHECKING:
    import torch

_PLACES = 16
_VALUES = 4096  # at each of them; sixteen short reads cost less than hashing the whole tensor would
Fingerprint = tuple[str, str]


def fingerprint(tensor: LazyTensor) -> Fingerprint:
    """Of a stored tensor; reads at most 65,536 values.

    >>> import numpy as np, weft
    >>> w = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
    >>> a, b = weft.open({"w": w})["w"], weft.open({"w": w.astype(np.float16)})["w"]
    >>> same(fingerprint(a), fingerprint(b)), same(fingerprint(a), fingerprint(weft.open({"w": w + 1})["w"]))
    (True, False)
    """
    width = tensor.dtype.bits // 8
    if not width:
        raise CheckpointError(f"{tensor.name}: a tensor of {tensor.dtype.name} has no fingerprint.")

    def read(first: int, last: int) -> np.ndarray:
        raw = np.empty((last - first) * width, np.uint8)
        tensor.read_into(raw.data, first * width)
        return raw.view(tensor.dtype.numpy)

    return _digests(read, tensor.shape, tensor.size, tensor.dtype)


def fingerprint_of(tensor: torch.Tensor) -> Fingerprint:
    """Of a live tensor, equal to that of the same tensor in a file."""
    import torch

    flat = tensor.detach().reshape(-1)

    def read(first: int, last: int) -> np.ndarray:
        return flat[first:last].cpu().contiguous().view(torch.uint8).numpy().view(dtype.numpy)

    dtype = dtype_of(str(tensor.dtype))
    return _digests(read, tuple(tensor.shape), tensor.numel(), dtype)


def same(first: Iterable[str], second: Iterable[str]) -> bool:
    """Whether two fingerprints can be of one tensor."""
    return any(a == b for a, b in zip(first, second))


def differing(saved: Mapping[str, Any], now: Mapping[str, Fingerprint]) -> list[str]:
    """Names whose fingerprints differ, of those that both have."""
    return [n for n, mine in now.items() if n in saved and not same(mine, _texts(saved[n]))]


def recorded_base(folder: Path) -> dict[str, Any]:
    """Fingerprints of an adapter's base, by tensor, that ``weft.json`` in its folder has; empty if it has none."""
    path = folder / "weft.json"
    if not path.is_file():
        return {}
    base = read_json(path).get("base")
    tensors = base.get("tensors") if isinstance(base, Mapping) else None
    return dict(tensors) if isinstance(tensors, Mapping) else {}


def check_base(adapter: Checkpoint, base: Checkpoint) -> str:
    """Whether an adapter was trained on a base in files; what is known of it, in a few words.

    Raises:
        CheckpointError: it was trained on another.
    """
    said = recorded_base(adapter.folder) if adapter.folder is not None else {}
    if not said:
        named = str(adapter.config.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2]
        other = f", and names {named!r}" if named and named != base.name.rpartition("/")[2] else ""
        return f"not checked: the adapter has no fingerprint of its base{other}"
    found = {}
    names = None if all(n in base for n in said) else live_names(base)
    renamed = names.places(said, base) if names is not None else {}
    for name in said:
        place = name if name in base else renamed.get(name) or _other_prefix(name, base)
        if place is not None and base[place].dtype.name in OUTPUT_DTYPES:
            found[name] = fingerprint(base[place])
    wrong = differing(said, found)
    if wrong:
        raise CheckpointError(another_base(adapter.name, wrong, len(found)))
    if not found:
        return "not checked: the base's tensors have other names, or are packed"
    return f"the same ({len(found)} of {len(said)} tensors compared)"


def _other_prefix(name: str, base: Checkpoint) -> str | None:
    """The tensor that a wrapper's prefix sets apart, if there is one."""
    found = [n for n in base if n.endswith(f".{name}") or name.endswith(f".{n}")]
    return found[0] if len(found) == 1 and "." in found[0] else None


def another_base(where: str, other: list[str], count: int) -> str:
    """The message for a base that is not the one an adapter was trained on."""
    return (
        f"{where}: was trained on another base: {len(other)} of {count} weights differ from it, such as {other[0]}. Take the "
        f"base that it was trained on (its name is in weft.json); to put it on this one all the same, pass check_base=False."
    )


def _texts(value: Any) -> list[str]:
    """A fingerprint as it comes from a file that may hold anything."""
    return [str(v) for v in value] if isinstance(value, list | tuple) else []


def _digests(read: Callable[[int, int], np.ndarray], shape: tuple[int, ...], size: int, dtype: DType) -> Fingerprint:
    if size <= _PLACES * _VALUES:
        bits = read(0, size)
    else:
        starts = [i * (size - _VALUES) // (_PLACES - 1) for i in range(_PLACES)]
        bits = np.concatenate([read(s, s + _VALUES) for s in starts])
    head = repr(shape).encode()
    if dtype.name not in OUTPUT_DTYPES:
        digest = xxhash.xxh3_64_hexdigest(head + bits.tobytes())
        return digest, digest
    values = to_float32(bits, dtype)
    first, second = (
        xxhash.xxh3_64_hexdigest(head + from_float32(values, DTYPES[kind]).tobytes()) for kind in ("BF16", "F16")
    )
    return first, second
