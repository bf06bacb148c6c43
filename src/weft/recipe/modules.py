"""Parts of a model with several parts (text, vision, projector; encoder, decoder), told apart by tensor names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from weft.recipe.layers import LAYER_COUNT_KEYS

# names under which transformers' models keep a part; a module that is not listed here is a prefix of names itself
_VISION = ("vision_tower", "vision_model", "visual")
_PLACES = {
    "vision_tower": _VISION,
    "vision_model": _VISION,
    "multi_modal_projector": (
        "multi_modal_projector",
        "mm_projector",
        "visual.merger",
        "visual.deepstack_merger_list",
    ),
    "text_decoder": ("language_model",),
    "shared": ("shared", "lm_head"),
}
_REST = ("text_decoder", "default")  # what no other module claims belongs to these
_COUNT_KEYS = {
    "encoder": ("encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_OTHER_CONFIGS = ("vision_config", "audio_config")


def module_of(name: str, modules: Collection[str]) -> str | None:
    """The module that a tensor belongs to: the one whose place in the name reaches deepest; None if there is none.

    >>> parts = ["text_decoder", "vision_tower", "multi_modal_projector"]
    >>> module_of("visual.merger.mlp.0.weight", parts), module_of("visual.blocks.0.norm1.weight", parts)
    ('multi_modal_projector', 'vision_tower')
    >>> module_of("lm_head.weight", parts)
    'text_decoder'
    """
    if len(modules) == 1:
        return next(iter(modules))

    def reach(module: str) -> int:
        places = [f".{p.strip('.')}." for p in _PLACES.get(module, (module,))]
        return max(f".{name}.".find(p) + len(p) if p in f".{name}." else 0 for p in places)

    best = max(modules, key=reach)
    if reach(best):
        return best
    return next((m for m in _REST if m in modules), None)


def resize_layers(config: dict[str, Any], old: int, origin: Sequence[int], module: str = "") -> dict[str, Any]:
    """A config for ``len(origin)`` layers; lists with one entry a layer follow ``origin``, each layer's old number.

    >>> resize_layers({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}, 3, [0, 2])
    {'num_hidden_layers': 2, 'layer_types': ['a', 'c']}
    """
    if module in ("vision_tower", "vision_model"):
        inner = config.get("vision_config")
        if not isinstance(inner, dict):
            return config
        return {**config, "vision_config": _resized(inner, old, origin, (*LAYER_COUNT_KEYS, "depth"))}
    return _resized(config, old, origin, _COUNT_KEYS.get(module, LAYER_COUNT_KEYS))


def _resized(config: dict[str, Any], old: int, origin: Sequence[int], keys: Collection[str]) -> dict[str, Any]:
    result = {}
    for key, value in config.items():
        if key in keys and value == old:
            value = len(origin)
        elif isinstance(value, list) and len(value) == old > 0 and key.endswith(("types", "layers", "pattern")):
            value = [value[i] for i in origin]
        elif isinstance(value, dict) and key not in _OTHER_CONFIGS:
            value = _resized(value, old, origin, keys)
        result[key] = value
    return result
