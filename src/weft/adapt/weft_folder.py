"""A folder of weft's own, for adapters that PEFT's files cannot say.

``weft_adapter.json`` names, for each adapted weight, the functions on it: the method's id, its configuration as JSON, and
which of its tensors are another weight's (pools that layers share). ``adapter.safetensors`` holds each tensor once, as
``<weight>:<function>:<tensor>``. Nothing in it is run: ids are looked up among the methods that are installed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.adapt.weights import AdaptedWeight, Stored
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.lora_folder import WEFT_CONFIG, WEFT_FORMAT
from weft.errors import CheckpointError, RecipeError, WeftError, did_you_mean
from weft.function.protocol import FunctionMethod
from weft.function.stack import gathered

Tensors = dict[str, Tensor]


def write_weft(weights: Sequence[AdaptedWeight]) -> tuple[dict[str, Any], Tensors]:
    """``weft_adapter.json`` and the tensors of an adapter.

    Raises:
        RecipeError: a function belongs to no method that is installed.
    """
    said: dict[str, dict[str, Any]] = {w.names[0]: _described(w) for w in weights}
    tensors: Tensors = {}
    holders: dict[int, tuple[str, int, str]] = {}
    for full, number, function in _in_order(weights):
        method, values = _named(function.config, full)
        entry: dict[str, Any] = {"method": method, "parameters": values}
        shared = {}
        for name, tensor in function.state_dict(keep_vars=True).items():
            if id(tensor) in holders:
                shared[name] = list(holders[id(tensor)])
            else:
                holders[id(tensor)] = (full, number, name)
                tensors[f"{full}:{number}:{name}"] = gathered(tensor.detach())
        said[full]["functions"].append(entry | ({"shared": shared} if shared else {}))
    return {"format": WEFT_FORMAT, "weights": said}, tensors


def _described(weight: AdaptedWeight) -> dict[str, Any]:
    """What a reader without the model needs to know of a weight: as functions see it."""
    layout = weight.stack.layout
    shape = list(layout.seen(weight.stack.original).shape)
    described: dict[str, Any] = {"layer": weight.layer.__name__, "shape": shape, "functions": []}
    if len(weight.names) > 1:
        described["tied"] = list(weight.names[1:])
    return described | {k: v for k, v in dataclasses.asdict(layout).items() if v}


def _in_order(weights: Sequence[AdaptedWeight]) -> list[tuple[str, int, Any]]:
    """Functions in the order in which they are attached again, so that what is shared is there before it is named."""
    leaves = list(dict.fromkeys(w.tensor for w in weights))
    found = [(n, leaves.index(w.tensor), w.names[0], f) for w in weights for n, f in enumerate(w.functions)]
    return [(full, number, function) for number, _, full, function in sorted(found, key=lambda row: row[:2])]


def _named(config: Any, full: str) -> tuple[str, dict[str, Any]]:
    """A configuration as a method's id and JSON."""
    from weft.registry import methods

    rows = [m for m in methods().values() if isinstance(m, FunctionMethod) and m.config is type(config)]
    if not rows:
        raise RecipeError(
            f"{full}: a {type(config).__name__} belongs to no method that is installed, so nobody could read it back. "
            "Give it a row in METHODS (see `weft methods`), or write the baked model with weft.save."
        )
    keys = {p.field: key for key, p in rows[0].parameters.items()}
    values = {keys[f.name]: getattr(config, f.name) for f in dataclasses.fields(config)}

    def fits(row: Any) -> int:
        return sum(values.get(k) == v for k, v in row.defaults.items()) - 10 * sum(
            values.get(k) != v for k, v in row.defaults.items()
        )

    best = max(rows, key=fits)
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return best.name, plain


@dataclasses.dataclass
class Described:
    """One weight of a folder: its functions, their tensors not yet read, and what is known of it.

    Attributes:
        shape: as functions see it.
        functions: configuration, tensors of its own, and those that it shares, of each.
        tied: whether other tensors of the model are this one.
        layout: what is not usual about how it is stored: batched, transposed, groups.
        layer: class of the layer that has it.
    """

    shape: tuple[int, ...]
    functions: list[tuple[Any, dict[str, LazyTensor], dict[str, tuple[str, int, str]]]]
    tied: bool
    layout: dict[str, Any]
    layer: str


def read_weft(adapter: Checkpoint) -> dict[str, list[Stored]]:
    """What :func:`write_weft` wrote, by weight.

    Raises:
        CheckpointError: as :func:`describe_weft`.
    """
    return {
        full: [Stored(c, {n: t.torch() for n, t in own.items()}, shared) for c, own, shared in weight.functions]
        for full, weight in describe_weft(adapter).items()
    }


def describe_weft(adapter: Checkpoint) -> dict[str, Described]:
    """What :func:`write_weft` wrote, by weight; reads no tensor.

    Raises:
        CheckpointError: the file is damaged, of a newer format, or names a method that is not installed.
    """
    where, described = adapter.name, adapter.config.get(WEFT_CONFIG)
    if not isinstance(described, Mapping) or described.get("format") != WEFT_FORMAT:
        found = described.get("format") if isinstance(described, Mapping) else None
        raise CheckpointError(
            f"{where}: its {WEFT_CONFIG}.json is of format {found!r}, and this weft reads {WEFT_FORMAT}. Use the version of "
            "weft that wrote it (weft.json says which)."
        )
    by_place: dict[tuple[str, int], dict[str, LazyTensor]] = {}
    for key, tensor in adapter.items():
        full, _, rest = key.partition(":")
        number, _, name = rest.partition(":")
        if not name or not (number.isascii() and number.isdigit()) or len(number) > 4:
            raise CheckpointError(f"{where}: the tensor {key!r} is not one that weft writes. The file is damaged.")
        if 0 in tensor.shape:
            raise CheckpointError(f"{where}: {key} is empty {list(tensor.shape)}; it was saved before it was gathered.")
        by_place.setdefault((full, int(number)), {})[name] = tensor
    result: dict[str, Described] = {}
    weights = described.get("weights")
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(f"{where}: names no weights. The save is incomplete.")
    for full, entry in weights.items():
        here = f"{where}: {full}"
        entries = entry.get("functions") if isinstance(entry, Mapping) else None
        shape: Any = entry.get("shape") if isinstance(entry, Mapping) else None
        good = isinstance(shape, list) and all(type(n) is int and 0 < n < 2**48 for n in shape) and 0 < len(shape) < 9
        if not good or not isinstance(entries, list) or not entries:
            raise CheckpointError(f"{here}: has no functions or no shape. The file is damaged.")
        functions = [
            (_configuration(e, here), by_place.pop((full, number), {}), _references(e, here))
            for number, e in enumerate(entries)
        ]
        layout = {k: entry[k] for k in ("batched", "transposed", "groups") if entry.get(k)}
        result[full] = Described(tuple(shape), functions, bool(entry.get("tied")), layout, str(entry.get("layer")))
    if by_place:
        extra = next(iter(by_place))[0]
        raise CheckpointError(
            f"{where}: holds tensors of {len(by_place)} functions that its {WEFT_CONFIG}.json does not name, such as "
            f"{extra!r}.{did_you_mean(extra, result)} Configuration and tensors are from different saves."
        )
    return result


def _configuration(entry: Any, where: str) -> Any:
    from weft.registry import method

    if not isinstance(entry, Mapping) or not isinstance(entry.get("parameters"), Mapping):
        raise CheckpointError(f"{where}: needs a method and its parameters. The file is damaged.")
    try:
        row = method(str(entry.get("method")))
        if not isinstance(row, FunctionMethod):
            raise RecipeError(f"{row.name} is no adapter.")
        return row.configure(dict(entry["parameters"]))
    except WeftError as error:
        raise CheckpointError(
            f"{where}: {error} It was written by another version of weft, or with a plugin that is not loaded."
        ) from None


def _references(entry: Mapping[str, Any], where: str) -> dict[str, tuple[str, int, str]]:
    shared = entry.get("shared", {})
    good = isinstance(shared, Mapping) and all(
        isinstance(v, list) and len(v) == 3 and isinstance(v[0], str) and type(v[1]) is int and isinstance(v[2], str)
        for v in shared.values()
    )
    if not good:
        raise CheckpointError(f"{where}: what it shares is not said as weft says it. The file is damaged.")
    return {str(k): (v[0], v[1], v[2]) for k, v in shared.items()}


def weft_files(folder: Path) -> bool:
    """Whether a folder is one of these."""
    return (folder / f"{WEFT_CONFIG}.json").is_file()
