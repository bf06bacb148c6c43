"""The converters of norms on pre-LN models of transformers, with random gains, shifts and biases: `make nightly`."""

import copy
from typing import Any

import pytest
import torch
import transformers

from weft.normalize import convert_to_crms_, convert_to_rms_

TEXT = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LONG = {**TEXT, "max_position_embeddings": 64, "intermediate_size": 48}
PICTURES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SHORT = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "vocab_size": 64,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", {**SHORT, "rotary_dim": 4}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", LONG),
    "opt": ("OPTForCausalLM", "OPTConfig", {**LONG, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("PhiForCausalLM", "PhiConfig", LONG),
    "falcon": ("FalconForCausalLM", "FalconConfig", TEXT),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {**LONG, "num_key_value_heads": 2, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {**LONG, "num_key_value_heads": 2}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**TEXT, "n_head": 4, "n_layer": 2}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", PICTURES),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", {"vision_config": PICTURES}),
}


@pytest.mark.parametrize("convert", [convert_to_rms_, convert_to_crms_])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays(name: str, convert: Any) -> None:
    model_class, config_class, sizes = MODELS[name]
    torch.manual_seed(0)
    for dtype, exact in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        before = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).to(dtype).eval()
        with torch.no_grad():
            for value in before.parameters():
                value.add_(0.2 * torch.randn_like(value))
        if before.main_input_name == "pixel_values":
            inputs = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
        else:
            inputs = {"input_ids": torch.randint(3, 64, (2, 11)), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
        model = copy.deepcopy(before)
        convert(model, inputs)
        old, new = before(**inputs).logits.detach(), model(**inputs).logits.detach()
        assert (old - new).abs().max() <= exact * old.abs().max()
