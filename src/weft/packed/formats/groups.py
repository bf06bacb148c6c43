"""compressed-tensors' ``config_groups``: which layers have which grids, in the configuration of a model.

A group has ``targets`` (a layer's full name, ``re:`` and a regular expression for its start, or a class such as Linear),
``weights`` and ``input_activations``. A name goes before an expression, and that before a class.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from weft.errors import CheckpointError

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
_DENSE = (None, "dense")


class Scheme(NamedTuple):
    """How one layer's weights, and its inputs, are quantised, as compressed-tensors says it."""

    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None


def make_groups(
    form: str, layers: Mapping[str, Scheme], ignored: Sequence[str], others: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of layers; one group where all have one scheme, else one of names for each.

    Args:
        form: the format.
        layers: what each is.
        ignored: linear layers that are not packed.
        others: layers that are in another format, and which.

    >>> made = make_groups("pack-quantized", {"a.fc": Scheme({"num_bits": 4}, None)}, ["lm_head"])
    >>> made["config_groups"]["group_0"]["targets"], made["ignore"]
    (['Linear'], ['lm_head'])
    """
    members: dict[str, list[str]] = {}
    for name, scheme in layers.items():
        members.setdefault(json.dumps([*scheme, (others or {}).get(name, form)], sort_keys=True), []).append(name)
    groups = {}
    for place, (text, names) in enumerate(members.items()):
        weights, inputs, written = json.loads(text)
        # a class says less than names do, but every engine understands it; embeddings are no linear layers
        tables = [n for n in names if n.rpartition(".")[2] in EMBEDDINGS]
        groups[f"group_{place}"] = {
            "targets": names if len(members) > 1 else (["Linear"] if len(tables) < len(names) else []) + tables,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": written,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": form if len({g["format"] for g in groups.values()}) < 2 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(ignored),
        "config_groups": groups,
    }


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what would make weights mean something else: sparsity, rotations, an unknown status.

    Raises:
        CheckpointError: it is there.
    """
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in _DENSE:
        raise CheckpointError(
            f"The model is sparse ({sparsity.get('format')!r}), which weft does not read. Decompress it with compressed-tensors."
        )
    rotations = config.get("transform_config")
    if isinstance(rotations, Mapping) and rotations.get("config_groups"):
        raise CheckpointError(
            "The model has a transform_config: its layers rotate their inputs, and the weights alone are not those of the plain "
            "model. weft does not undo it; take the model that was quantised."
        )
    _groups(config)


def scheme_of(name: str, config: Mapping[str, Any]) -> Scheme:
    """The scheme of a layer.

    Raises:
        CheckpointError: no group has it.
    """
    groups = _groups(config)
    found = None
    for rank in (_is_name, _is_expression, _is_class):
        found = next((g for g in groups for target in g["targets"] if rank(str(target), name)), None)
        if found is not None:
            break
    if found is None and len(groups) == 1:
        found = groups[0]  # a wrapper's prefix sets names apart, and there is no choice
    if found is None:
        raise CheckpointError(
            f"{name} is packed, and none of the {len(groups)} config_groups of its quantization_config has it as a target. "
            "Add it to the group that it belongs to in config.json."
        )
    inputs = found.get("input_activations")
    return Scheme(found["weights"], inputs if isinstance(inputs, Mapping) else None)


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups")
    values = list(groups.values()) if isinstance(groups, Mapping) else []
    good = [
        g for g in values
        if isinstance(g, Mapping) and isinstance(g.get("targets"), list) and isinstance(g.get("weights"), Mapping)
    ]  # fmt: skip
    if not good:
        raise CheckpointError(
            "The quantization_config has no config_groups with targets and weights, so nothing says how the codes are meant. "
            "Repair config.json, or fetch it again."
        )
    return good


def _is_name(target: str, name: str) -> bool:
    return target == name


def _is_expression(target: str, name: str) -> bool:
    if not target.startswith("re:"):
        return False
    try:
        return re.match(target[3:], name) is not None
    except re.error as error:
        raise CheckpointError(
            f"config_groups have the target {target[:80]!r}, which is no expression: {error}."
        ) from None


def _is_class(target: str, name: str) -> bool:
    """Whether a target is a class that the layer may be of; files do not say which it is."""
    if not target.isidentifier():
        return False
    return target == "Embedding" if name.rpartition(".")[2] in EMBEDDINGS else target != "Embedding"
