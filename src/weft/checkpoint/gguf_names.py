"""What GGUF and transformers call the same things: tensors by architecture, and the sizes of a model.

The tables are those of ``gguf.get_tensor_name_map``, held against it in the tests. Three things differ beyond names: heads
of ``llama`` turn pairs of neighbouring rows in GGUF and pairs half a head apart in transformers, so rows of q and k are
reordered; norms of Gemma multiply by w in GGUF and by 1 + w in transformers; tied embeddings have no ``output.weight``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weft.checkpoint.gguf_header import GGUFHeader, value_bytes
from weft.errors import RecipeError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")
_HF_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """How tensors of one of GGUF's architectures are called.

    Attributes:
        name: in ``general.architecture``.
        layer: what stands behind ``blk.N.`` and behind ``model.layers.N.``.
        model_class: of transformers, whose configuration can be said from the metadata; empty if it cannot.
        permuted: rows of q and k are in another order.
        shifted: norms are stored with 1 added.
    """

    name: str
    layer: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    model_class: str = ""
    permuted: bool = False
    shifted: bool = False

    def to_hugging_face(self, name: str) -> str | None:
        """A tensor's name in transformers; None if it has none.

        >>> ARCHITECTURES["llama"].to_hugging_face("blk.3.attn_q.weight")
        'model.layers.3.self_attn.q_proj.weight'
        """
        stem, _, last = name.rpartition(".")
        if stem in _TOP and last in ("weight", "bias"):
            return f"{_TOP[stem]}.{last}"
        found = _BLOCK.fullmatch(name)
        if found is None or found[2] not in self.layer:
            return None
        return f"model.layers.{found[1]}.{self.layer[found[2]]}.{found[3]}"

    def to_gguf(self, name: str) -> str | None:
        """A tensor's name in GGUF; None if it has none.

        >>> ARCHITECTURES["llama"].to_gguf("lm_head.weight")
        'output.weight'
        """
        stem, _, last = name.rpartition(".")
        top = {theirs: ours for ours, theirs in _TOP.items()}
        if stem in top and last in ("weight", "bias"):
            return f"{top[stem]}.{last}"
        found = _HF_LAYER.fullmatch(name)
        layer = {theirs: ours for ours, theirs in self.layer.items()}
        if found is None or found[2] not in layer:
            return None
        return f"blk.{found[1]}.{layer[found[2]]}.{found[3]}"


ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("llama", model_class="LlamaForCausalLM", permuted=True),
        Architecture("qwen2", model_class="Qwen2ForCausalLM"),
        Architecture("qwen3", {**_LAYER, **_HEAD_NORMS}, "Qwen3ForCausalLM"),
        Architecture("gemma", shifted=True),
        Architecture("gemma2", {**_LAYER, **_FOUR_NORMS}, shifted=True),
        Architecture("gemma3", {**_LAYER, **_FOUR_NORMS, **_HEAD_NORMS}, shifted=True),
    )
}
ROPE_FACTORS = "rope_freqs.weight"
WRITTEN = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> architecture
_LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_ROPE: dict[str, tuple[str, ...]] = {  # the types that are written, and what they say
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", *_LLAMA3),
}
_ROPE_DEFAULTS = {"partial_rotary_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": True}  # llama.cpp's too
_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_UNDERSTOOD = {
    *_SIZES, "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "vocab_size", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


def head_counts(header: GGUFHeader) -> tuple[int, int] | None:
    """Heads of queries, and of keys and values; None if the metadata does not say one number for all layers."""
    name = header.architecture
    heads = header.get(f"{name}.attention.head_count")
    pairs = header.get(f"{name}.attention.head_count_kv", heads)
    good = all(type(n) is int and 0 < n < 1 << 20 for n in (heads, pairs))
    return (heads, pairs) if good else None


def config_from_metadata(
    header: GGUFHeader, shapes: Mapping[str, tuple[int, ...]], factors: np.ndarray | None = None
) -> tuple[dict[str, Any], str]:
    """The configuration of transformers that the metadata says without doubt.

    Args:
        header: of the file.
        shapes: of all tensors, by their names in transformers.
        factors: the values of ``rope_freqs.weight``, if there is such a tensor.

    Returns:
        The configuration, and why it is empty if it is.
    """
    name = header.architecture
    row = ARCHITECTURES.get(name)
    if row is None or not row.model_class:
        return {}, f"weft knows no configuration for the architecture {name!r}"
    strange = [k for k in header.entries if k.startswith(f"{name}.") and k.removeprefix(f"{name}.") not in _UNDERSTOOD]
    if strange:
        return {}, f"{strange[0]} says something that weft does not translate"
    config: dict[str, Any] = {"architectures": [row.model_class], "model_type": name}
    for key, theirs in _SIZES.items():
        value = header.get(f"{name}.{key}")
        if type(value) is not int or not 0 < value < 1 << 31:
            return {}, f"{name}.{key} is not one whole number"
        config[theirs] = value
    counts = head_counts(header)
    if counts is None:
        return {}, f"{name}.attention.head_count_kv is not one whole number"
    config["num_key_value_heads"] = counts[1]
    head = header.get(f"{name}.attention.key_length", config["hidden_size"] // counts[0])
    for key in ("attention.value_length", "rope.dimension_count"):
        if header.get(f"{name}.{key}", head) != head:
            return {}, f"{name}.{key} differs from the size of a head"
    config["head_dim"] = head
    config["vocab_size"] = shapes.get("model.embed_tokens.weight", (0,))[0]
    if header.get(f"{name}.vocab_size", config["vocab_size"]) != config["vocab_size"]:
        return {}, f"{name}.vocab_size differs from the rows of token_embd.weight"
    epsilon, theta = (
        header.get(f"{name}.{k}", d) for k, d in (("attention.layer_norm_rms_epsilon", None), ("rope.freq_base", 1e4))
    )
    if type(epsilon) is not float or type(theta) is not float:
        return {}, f"{name}.attention.layer_norm_rms_epsilon or {name}.rope.freq_base is no number"
    config["rms_norm_eps"] = _shortest(epsilon)
    rope = _rope_from_metadata(header, name, _shortest(theta))
    if rope is None:
        return {}, f"{name}.rope.scaling.type is not translated"
    if factors is not None and rope["rope_type"] == "default":
        rope |= {**_LLAMA3, "factor": float(factors.max())} if factors.size else {}
        said = rope_factors({**config, "rope_parameters": rope})
        if said is None or said.shape != factors.shape or not np.allclose(said, factors, rtol=1e-5, atol=0):
            return {}, f"{ROPE_FACTORS} are not those of Llama 3.1, and no configuration says others"
    config["rope_parameters"] = rope
    config["rope_theta"] = rope["rope_theta"]  # what transformers 4 reads
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    config["hidden_act"] = "silu"
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    if name != "qwen2":
        config["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in shapes
    if name == "llama":
        config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in shapes
    for key, theirs in _TOKENS.items():
        token = header.get(f"tokenizer.ggml.{key}")
        if type(token) is int and token < config["vocab_size"]:
            config[theirs] = token
    model = {n: s for n, s in shapes.items() if n != ROPE_FACTORS or factors is None}
    if config["num_hidden_layers"] > len(model) or model != _expected(config):
        return {}, "its tensors are not those of such a model"
    return config, ""


def metadata_from_config(config: Mapping[str, Any], name: str) -> dict[str, tuple[int, bytes]]:
    """The metadata of GGUF that says a configuration of transformers.

    Args:
        config: ``config.json`` of a model whose type is a key of ``WRITTEN``.
        name: of the model.

    Raises:
        RecipeError: the type is not written, or the configuration says something that GGUF has no place for.
    """
    kind = str(config.get("model_type", ""))
    if kind not in WRITTEN:
        raise RecipeError(
            f"{name}: models of the type {kind!r} are not written as GGUF, only {', '.join(WRITTEN)}. "
            "Use llama.cpp's convert_hf_to_gguf.py."
        )
    own = WRITTEN[kind]
    for key in ("num_local_experts", "num_experts", "quantization_config", "use_sliding_window"):
        if config.get(key):
            raise RecipeError(
                f"{name}: {key} is set in config.json, which GGUF's {own} cannot say, or weft does not write."
            )
    if config.get("hidden_act", "silu") != "silu":
        raise RecipeError(f"{name}: hidden_act is {config['hidden_act']!r}, and GGUF's {own} is always silu.")
    label = name.encode("utf-8", "replace").decode()  # folders may be called anything
    entries = {
        "general.architecture": value_bytes("string", own),
        "general.type": value_bytes("string", "model"),
        **({"general.name": value_bytes("string", label)} if label else {}),
    }
    try:
        for key, theirs in _SIZES.items():
            entries[f"{own}.{key}"] = value_bytes("uint32", _whole(config, theirs, name))
        heads = config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // heads
        entries[f"{own}.attention.head_count_kv"] = value_bytes("uint32", config.get("num_key_value_heads") or heads)
        entries[f"{own}.attention.key_length"] = value_bytes("uint32", head)
        entries[f"{own}.attention.value_length"] = value_bytes("uint32", head)
        epsilon = float(config.get("rms_norm_eps", 1e-6))
        entries[f"{own}.attention.layer_norm_rms_epsilon"] = value_bytes("float32", epsilon)
        entries[f"{own}.rope.dimension_count"] = value_bytes("uint32", head)
        entries[f"{own}.vocab_size"] = value_bytes("uint32", _whole(config, "vocab_size", name))
        return {**entries, **_rope_entries(config, own, name)}
    except (KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{name}: config.json is damaged or incomplete ({error!r}). Replace it.") from None


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of rotary embeddings, in the old form or the new: ``rope_type``, ``rope_theta`` and more."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    made = {k: v for k, v in rope.items() if v is not None and k != "type"}
    return {"rope_type": rope.get("type", "default"), "rope_theta": config.get("rope_theta", 10000.0), **made}


def _rope_entries(config: Mapping[str, Any], own: str, name: str) -> dict[str, tuple[int, bytes]]:
    rope = rope_of(config)
    kind = rope["rope_type"]
    if kind not in _ROPE:
        raise RecipeError(f"{name}: rotary embeddings of the type {kind!r} are not written as GGUF.")
    for key, value in rope.items():
        if key not in ("rope_type", "rope_theta", *_ROPE[kind]) and _ROPE_DEFAULTS.get(key) != value:
            raise RecipeError(f"{name}: rotary embeddings with {key} = {value!r} are not written as GGUF.")
    entries = {f"{own}.rope.freq_base": value_bytes("float32", float(rope["rope_theta"]))}
    if kind == "llama3":
        rope_factors(config)  # which must be there
    if kind in ("linear", "yarn"):
        entries[f"{own}.rope.scaling.type"] = value_bytes("string", kind)
        entries[f"{own}.rope.scaling.factor"] = value_bytes("float32", float(rope["factor"]))
    if kind == "yarn":
        old = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
        entries[f"{own}.rope.scaling.original_context_length"] = value_bytes("uint32", old)
    return entries


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """What ``rope_freqs.weight`` holds for Llama 3's scaling: the divisor of each frequency; None for other models.

    Frequencies whose wave is longer than the old context / ``low_freq_factor`` are divided by ``factor``, those with waves
    shorter than it / ``high_freq_factor`` are left, and those between go over smoothly (Llama 3.1).
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    theta = float(rope["rope_theta"])
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    waves = 2 * np.pi * theta ** (np.arange(0, head, 2, dtype=np.float64) / head)
    old = float(rope["original_max_position_embeddings"])
    smooth = (old / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(waves < old / high, 1.0, np.where(waves > old / low, factor, between)).astype(np.float32)


def _whole(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if type(value) is not int or value <= 0:
        raise RecipeError(f"{name}: config.json needs a whole number {key}, found {value!r}.")
    return value


def _shortest(value: float) -> float:
    """The shortest decimal that a float32 stands for: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_from_metadata(header: GGUFHeader, name: str, theta: float) -> dict[str, Any] | None:
    kind = header.get(f"{name}.rope.scaling.type", "none")
    factor = header.get(f"{name}.rope.scaling.factor")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta} if factor in (None, 0.0, 1.0) else None
    if kind not in ("linear", "yarn") or type(factor) is not float:
        return None
    made = {"rope_type": kind, "rope_theta": theta, "factor": _shortest(factor)}
    old = header.get(f"{name}.rope.scaling.original_context_length")
    if kind == "yarn":
        if type(old) is not int:
            return None
        made["original_max_position_embeddings"] = old
    return made


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model with that configuration."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, pairs = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    made: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        made["lm_head.weight"] = (config["vocab_size"], hidden)
    projections = {"q": (queries, hidden), "k": (pairs, hidden), "v": (pairs, hidden), "o": (hidden, queries)}
    biased = "qkv" if config["model_type"] == "qwen2" else "qkvo" if config["attention_bias"] else ""
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for part, shape in projections.items():
            made[f"{layer}.self_attn.{part}_proj.weight"] = shape
            if part in biased:
                made[f"{layer}.self_attn.{part}_proj.bias"] = shape[:1]
        for part, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            made[f"{layer}.mlp.{part}_proj.weight"] = shape
            if config.get("mlp_bias"):
                made[f"{layer}.mlp.{part}_proj.bias"] = shape[:1]
        for part in ("input_layernorm", "post_attention_layernorm"):
            made[f"{layer}.{part}.weight"] = (hidden,)
        if config["model_type"] == "qwen3":
            made |= {f"{layer}.self_attn.{part}_norm.weight": (head,) for part in "qk"}
    return made
