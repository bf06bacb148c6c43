"""Checkpoints of a chosen size with the names, shapes and files of a Llama model, filled with random weights.

python benchmarks/llama_shaped.py OUT --parameters 0.5e9 --fine-tunes 3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from weft.checkpoint.dtypes import DTYPES
from weft.checkpoint.header import build_header
from weft.engine.plan import index_file, split_into_shards
from weft.kernels.convert import from_float32

VOCABULARY = 32_000
HEAD_DIM = 64


def dimensions(parameters: float) -> dict[str, int]:
    """Hidden size, intermediate size and layers of a Llama-shaped model near ``parameters``."""
    sizes = [(256, 6), (512, 8), (768, 12), (1024, 16), (1280, 20), (2048, 22), (3072, 26), (4096, 32)]

    def count(hidden: int, layers: int) -> int:
        return 2 * VOCABULARY * hidden + layers * (4 * hidden**2 + 3 * hidden * int(hidden * 2.7))

    hidden, layers = min(sizes, key=lambda s: abs(count(*s) - parameters))
    return {"hidden": hidden, "intermediate": int(hidden * 2.7), "layers": layers}


def shapes(hidden: int, intermediate: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors."""
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            result[f"{p}self_attn.{name}_proj.weight"] = (hidden, hidden)
        result[p + "mlp.gate_proj.weight"] = (intermediate, hidden)
        result[p + "mlp.up_proj.weight"] = (intermediate, hidden)
        result[p + "mlp.down_proj.weight"] = (hidden, intermediate)
        result[p + "input_layernorm.weight"] = (hidden,)
        result[p + "post_attention_layernorm.weight"] = (hidden,)
    result["model.norm.weight"] = (hidden,)
    result["lm_head.weight"] = (VOCABULARY, hidden)
    return result


def write_model(folder: Path, size: dict[str, int], *, seed: int, shards: int, change: float) -> None:
    """A base (``change`` 0) or a fine-tune whose weights differ from the base by noise of scale ``change``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = shapes(**size)
    nbytes = {n: 2 * int(np.prod(s)) for n, s in tensors.items()}
    files = split_into_shards(nbytes, sum(nbytes.values()) // shards + 30_000_000)
    dtype = DTYPES["BF16"]
    for file, names in files.items():
        prefix, header = build_header(((n, dtype, tensors[n]) for n in names), {})
        with (folder / file).open("wb") as out:
            out.write(prefix)
            for name, info in header.tensors.items():
                position = list(tensors).index(name)
                values = np.random.default_rng([0, position]).standard_normal(info.shape, np.float32)
                values *= 0.02 if len(info.shape) > 1 else 0.0
                values += 0.0 if len(info.shape) > 1 else 1.0
                if change:
                    noise = np.random.default_rng([seed, position]).standard_normal(info.shape, np.float32)
                    values += change * noise
                out.write(from_float32(values, dtype).tobytes())
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file(files, sum(nbytes.values()))))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": size["hidden"],
        "intermediate_size": size["intermediate"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["hidden"] // HEAD_DIM,
        "num_key_value_heads": size["hidden"] // HEAD_DIM,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    # mergekit fails after writing unless every input has a tokenizer
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    """Write a base and its fine-tunes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parameters", type=float, default=0.5e9)
    parser.add_argument("--fine-tunes", type=int, default=3)
    parser.add_argument("--shards", type=int, default=4)
    arguments = parser.parse_args()
    size = dimensions(arguments.parameters)
    write_model(arguments.out / "base", size, seed=0, shards=arguments.shards, change=0)
    for i in range(arguments.fine_tunes):
        write_model(arguments.out / f"ft{i}", size, seed=i + 1, shards=arguments.shards, change=1e-3)


if __name__ == "__main__":
    main()
