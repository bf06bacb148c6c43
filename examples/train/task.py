"""What the examples train: a small Llama on the characters of the standard library's source."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor

LENGTH = 64


def model() -> transformers.LlamaForCausalLM:
    """A model to fine-tune; in life it comes from ``from_pretrained``."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH, use_cache=False,
        )
    )  # fmt: skip


def rows(count: int) -> list[dict[str, Tensor]]:
    """Samples of one row of characters each."""
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()[: count * LENGTH]
    tokens = torch.tensor(list(text)).clamp_max(127).reshape(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in tokens]


def batches(count: int, size: int = 8) -> Iterator[dict[str, Tensor]]:
    """The same batches each time, as training that goes on must see."""
    samples = rows(count * size)
    for start in range(0, count * size, size):
        together = torch.stack([s["input_ids"] for s in samples[start : start + size]])
        yield {"input_ids": together, "labels": together}
