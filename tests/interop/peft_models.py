"""Tiny models, and adapters that PEFT trains on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# Sums of at most 32 float32 products and, for DoRA, a norm and a quotient: each side is off by at most this much of
# the largest value, and the two sides add up in different orders.
TOLERANCE = 64 * np.finfo(np.float32).eps


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "initializer_range": 0.2,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()


def gpt2(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | changes)).eval()


def bert_classifier(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_labels": 3, "initializer_range": 0.2,
    }  # fmt: skip
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes | changes)).eval()


class Small(torch.nn.Module):
    """Layers that no small transformer has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 5, (3, 2))
        self.point = torch.nn.Conv2d(5, 4, 1)
        self.line = torch.nn.Conv1d(3, 4, 3)
        self.table = torch.nn.Embedding(9, 4)
        self.fc = torch.nn.Linear(4, 4, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def train(model: Any, folder: Path, *, seed: int = 1, kind: Any = None, **settings: Any) -> Any:
    """A PEFT model whose trainable parameters are random, saved in ``folder``."""
    config = kind(**settings) if kind else peft.LoraConfig(**{"r": 3, "lora_alpha": 5} | settings)
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(folder)
    return adapted


def state(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
