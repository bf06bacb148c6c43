"""Where the tensors of an adapter belong in a base, also where the two call the same layers otherwise.

transformers renames layers when it loads them, so an adapter's names are the live model's and a base's those of files,
or the other way around. A checkpoint of the bare model lacks the wrapper's prefix (``transformer.``, ``model.``).
An adapter that does not find every one of its places is refused: what is silently not loaded is found out last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from weft.checkpoint.live_names import LiveNames
from weft.checkpoint.lora_folder import Adapter
from weft.errors import CheckpointError, did_you_mean

_MAX_STRIP = 2  # leading parts of a path by which the names in an adapter and in a base may differ


def holds(modules: Sequence[str], tensor: str) -> bool:
    """Whether one of ``modules`` (ends of paths) is the module that holds ``tensor``."""
    return any(f".{tensor.rpartition('.')[0]}".endswith(f".{module}") for module in modules)


def find_places(
    adapter: Adapter,
    tensors: Collection[str],
    saved: Sequence[str],
    where: str,
    also: Sequence[str] = (),
    live: Callable[[], LiveNames | None] | None = None,
) -> dict[str, str]:
    """Names of the base's tensors by the adapter's modules and tensors.

    Args:
        adapter: what is to be placed.
        tensors: names in the base.
        saved: modules that the adapter holds whole; they may be new.
        where: how to call both in messages.
        also: names that are no tensors of the base and count as such.
        live: how transformers renames the base's tensors, asked if they are not found by their own names.

    Raises:
        CheckpointError: one has no place, also with another prefix; the message names the nearest. Or transformers makes
            it from several tensors of the base.
    """
    paths = [(module, ".weight") for module in (*adapter.parts, *adapter.rows)]
    paths += [(name, "") for name in (*adapter.originals, *adapter.whole)]
    known = {*tensors, *also}
    ends = {_end(name) for name in tensors}

    def found(name: str) -> bool:
        return name in known

    def new(name: str) -> bool:
        return holds(saved, name) and _end(name) not in ends

    def lay(strip: str, add: str) -> tuple[dict[str, str], list[str]]:
        result = {}
        for path, suffix in paths:
            renamed = add + path.removeprefix(strip) + suffix
            result[path] = renamed if found(renamed) or not found(path + suffix) else path + suffix
        lost = [p for p, t in result.items() if not found(t) and not new(p)]
        return result, lost

    exact, lost = lay("", "")
    if not lost:
        return exact
    names = live() if live is not None else None
    if names is not None:
        placed = names.places((exact[p] for p in lost), tensors, where)
        if all(exact[p] in placed for p in lost):
            return exact | {p: placed[exact[p]] for p in lost}
    options: list[dict[str, str]] = []
    for strip, add in _prefixes(lost[0], tensors):
        result, missing = lay(strip, add)
        if not missing and result not in options:
            options.append(result)
    if len(options) == 1:
        return options[0]
    first = exact[lost[0]]
    if options:
        places = " and ".join(o[lost[0]] for o in options)
        raise CheckpointError(f"{where}: {first} of the adapter fits the base in several places: {places}.")
    raise CheckpointError(
        f"{where}: the base has no tensor {first!r}, which the adapter changes ({len(lost)} of {len(exact)} are not "
        f"found).{did_you_mean(first, tensors)} The adapter was trained on another model, or on one with other names."
    )


def _end(name: str) -> str:
    """The last module and what it holds: ``norm.weight``."""
    return ".".join(name.split(".")[-2:])


def _prefixes(path: str, tensors: Iterable[str]) -> list[tuple[str, str]]:
    """(what to strip, what to add) so that ``path``, which must name a numbered layer, is in the base."""
    pieces = path.split(".")
    options = []
    for count in range(min(_MAX_STRIP, len(pieces) - 1) + 1):
        rest = ".".join(pieces[count:])
        if not any(piece.isdigit() for piece in pieces[count:]):
            continue
        for name in tensors:
            for suffix in ("", ".weight"):
                if f".{name}".endswith(f".{rest}{suffix}"):
                    options.append((".".join(pieces[:count]) + "." * (count > 0), name.removesuffix(rest + suffix)))
    return options
