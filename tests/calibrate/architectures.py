"""Small models of every architecture that is promised, with random weights and a few batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

_COMMON = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
_DECODER = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

MODELS: dict[str, Callable[[], tuple[type, Any]]] = {
    "llama": lambda: (transformers.LlamaForCausalLM, transformers.LlamaConfig(**_DECODER)),
    "qwen3": lambda: (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**_DECODER, head_dim=8)),
    "gemma3": lambda: (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(
            **{**_DECODER, "num_hidden_layers": 4}, head_dim=8, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "mixtral": lambda: (
        transformers.MixtralForCausalLM, transformers.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2),
    ),
    "qwen2_moe": lambda: (
        transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig(**_DECODER, **_EXPERTS, shared_expert_intermediate_size=24),
    ),
    "qwen3_moe": lambda: (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**_DECODER, **_EXPERTS, head_dim=8)),
    "gpt_oss": lambda: (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(
            **_DECODER, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gpt2": lambda: (
        transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=32, n_head=4, n_layer=3, vocab_size=64, n_positions=64),
    ),
    "bert": lambda: (transformers.BertModel, transformers.BertConfig(**_COMMON, intermediate_size=48)),
    "bert_masked": lambda: (transformers.BertForMaskedLM, transformers.BertConfig(**_COMMON, intermediate_size=48)),
    "modernbert": lambda: (
        transformers.ModernBertForMaskedLM,
        transformers.ModernBertConfig(
            **{**_COMMON, "num_hidden_layers": 4}, **_IDS, intermediate_size=48, global_attn_every_n_layers=2, local_attention=8,
        ),
    ),
    "t5": lambda: (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=64, decoder_start_token_id=0),
    ),
    "vit": lambda: (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
        ),
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A model in evaluation and three batches, with padding where the model knows it."""
    model_class, config = MODELS[name]()
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    batches = []
    for i in range(3):
        if name == "vit":
            batches.append({"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(dtype)})
            continue
        tokens = torch.randint(3, 64, (2, 11 + i), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, -3:] = 0
        batch = {"input_ids": tokens, "attention_mask": mask}
        if name == "t5":
            batch["decoder_input_ids"] = tokens[:, :7]
        batches.append(batch)
    return model, batches
