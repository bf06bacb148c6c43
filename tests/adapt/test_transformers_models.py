"""Adapters in models of transformers as their users train them: checkpointed gradients, autocast, accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
from weft.adapt import Bone, LoRA, load_adapter_, save_adapter

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(0, 37, (3, 7), generator=torch.Generator().manual_seed(0))
BATCHES: dict[str, dict[str, Tensor]] = {
    "t5": {"input_ids": IDS, "labels": IDS},
    "mixtral": {"input_ids": IDS, "labels": IDS},
    "vit": {
        "pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "labels": torch.tensor([0, 1, 1]),
    },
}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    t = transformers
    if kind == "t5":
        sizes = {"vocab_size": 37, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
        return t.T5ForConditionalGeneration(t.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))
    if kind == "vit":
        return t.ViTForImageClassification(t.ViTConfig(**SIZES, image_size=8, patch_size=4))
    return t.MixtralForCausalLM(
        t.MixtralConfig(**SIZES, vocab_size=37, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    )


def adapted(kind: str, config: Any) -> Any:
    model = model_of(kind)
    if kind == "mixtral":  # stacks of all experts' matrices, whatever they are called
        for tensor in ("gate_up_proj", "down_proj"):
            weft.adapt_(model, config, where="experts", tensor=tensor, name=tensor)
        weft.adapt.train_only_(model, ["gate_up_proj", "down_proj"])
    else:
        weft.adapt_(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model: Any, batch: dict[str, Tensor], parts: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    for part in range(parts):
        (model(**{n: t[part::parts] for n, t in batch.items()}).loss / parts).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [LoRA(rank=2), Bone(rank=2)], ids=["lora", "miss"])
@pytest.mark.parametrize("kind", BATCHES)
def test_gradients_are_the_same_checkpointed_and_accumulated(kind: str, config: Any) -> None:
    model, batch = adapted(kind, config), BATCHES[kind]
    plain = gradients(model, batch)
    assert all("parametrizations" in n for n in plain)
    assert all(g.abs().max() > 0 for g in plain.values())
    for reentrant in (False, True) if kind != "vit" else (False,):  # images need no gradient, as reentrant ones want
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        found = gradients(model, batch)
        assert found.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        model.gradient_checkpointing_disable()
    if kind != "mixtral":  # whose auxiliary loss is of a whole batch
        for name, gradient in gradients(model, batch, parts=3).items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = gradients(model, batch)
    assert low.keys() == plain.keys()
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in low.values())
    first, second = (torch.cat([g.flatten() for g in some.values()]) for some in (low, plain))
    assert torch.cosine_similarity(first, second, dim=0) > 0.95  # products of bfloat16


@pytest.mark.parametrize("kind", BATCHES)
def test_saved_loaded_and_baked(kind: str, tmp_path: Path) -> None:
    model, batch = adapted(kind, Bone(rank=2)).eval(), BATCHES[kind]
    fresh = model_of(kind).eval()
    for name in weft.adapt.adapters(model):
        save_adapter(model, tmp_path / name, name)
        assert load_adapter_(fresh, tmp_path / name, name=name).base == "the same"
    weft.save(model, tmp_path / "baked")
    made = type(model_of(kind)).from_pretrained(tmp_path / "baked").eval()
    with torch.no_grad():
        live, again, baked = (m(**batch).logits for m in (model, fresh, made))
    assert torch.equal(live, again)
    assert (live - baked).abs().max() < 1e-5 * live.abs().max()
