"""Tiny Llama folders with tokenizers, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

HIDDEN = 32


def llama_shapes(layers: int, vocabulary: int, hidden: int = HIDDEN, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with two query heads for each key-value head."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "self_attn.q_proj.weight": (hidden, hidden),
            p + "self_attn.k_proj.weight": (hidden // 2, hidden),
            p + "self_attn.v_proj.weight": (hidden // 2, hidden),
            p + "self_attn.o_proj.weight": (hidden, hidden),
            p + "mlp.gate_proj.weight": (2 * hidden, hidden),
            p + "mlp.up_proj.weight": (2 * hidden, hidden),
            p + "mlp.down_proj.weight": (hidden, 2 * hidden),
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,)} | ({} if tied else {"lm_head.weight": (vocabulary, hidden)})


def write_llama(
    folder: Path,
    *,
    seed: int,
    layers: int = 4,
    rows: int | None = None,
    words: Sequence[str] = (),
    special: Sequence[str] = ("<s>", "</s>"),
    start_at: Path | None = None,
    change: float = 0.1,
    tied: bool = False,
    template: str = "",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A folder with random weights (or those of ``start_at``, changed a little), a config and a tokenizer."""
    folder.mkdir(parents=True)
    words = list(words) or [f"w{i}" for i in range(20)]
    rows = len(words) + len(special) if rows is None else rows
    random = np.random.default_rng(seed)
    old = load_file(start_at / "model.safetensors") if start_at else {}
    tensors = {}
    for name, shape in llama_shapes(layers, rows, tied=tied).items():
        noise = random.standard_normal(shape)
        same = name in old and old[name].shape == shape
        tensors[name] = (old[name] + change * noise if same else noise).astype(np.float32)
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    ids = {s: i for i, s in enumerate(special)}
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "vocab_size": rows,
        "bos_token_id": ids.get("<s>"),
        "eos_token_id": ids.get("</s>"),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps({**settings, **(config or {})}))
    write_tokenizer(folder, words, special, template)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str], special: Sequence[str], template: str = "") -> None:
    """A tokenizer of whole words: the special tokens have the first ids."""
    added = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, t in enumerate(special)
    ]  # fmt: skip
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {t: i for i, t in enumerate([*special, *words])},
            "unk_token": words[0],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    settings |= {"bos_token": "<s>"} if "<s>" in special else {}
    settings |= {"eos_token": "</s>"} if "</s>" in special else {}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
