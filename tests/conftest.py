"""Fixtures shared by the suite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A safetensors file written by the reference library."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: np.ascontiguousarray(v) for n, v in tensors.items()}, str(path))
    return path


@pytest.fixture
def llama_folder() -> Callable[..., Path]:
    """Make a tiny Llama-shaped folder: ``llama_folder(path, seed=1, layers=2, hidden=8)``."""

    def make(
        folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 8, vocabulary: int = 16, change: float = 0.05
    ) -> Path:
        base, random = np.random.default_rng(0), np.random.default_rng([1, seed])
        shapes = {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (vocabulary, hidden),
        }
        for i in range(layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                shapes[f"model.layers.{i}.self_attn.{name}.weight"] = (hidden, hidden)
            for name, shape in {
                "gate_proj": (2 * hidden, hidden),
                "up_proj": (2 * hidden, hidden),
                "down_proj": (hidden, 2 * hidden),
            }.items():
                shapes[f"model.layers.{i}.mlp.{name}.weight"] = shape
            shapes[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
            shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (hidden,)
        tensors = {}
        for name, shape in shapes.items():
            value = base.standard_normal(shape) + (change * random.standard_normal(shape) if seed else 0.0)
            tensors[name] = value.astype(np.float32)
        write_safetensors(folder / "model.safetensors", tensors)
        config = {
            "model_type": "llama",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "vocab_size": vocabulary,
            "tie_word_embeddings": False,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def weft_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own: ``weft_command("merge", "a", "b", "-o", "c")``."""

    def run(
        *arguments: object, cwd: Path | None = None, check: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "weft.cli.app", *map(str, arguments)],
            capture_output=True, text=True, cwd=cwd, check=check, timeout=120, env={**os.environ, **environment},
        )  # fmt: skip

    return run
