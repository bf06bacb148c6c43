"""What weft check says of transformers is what transformers does: experts and embeddings in each layout."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft.quantize import RTN, load_quantized, quantize_model
from weft.quantize.serving import check_serving

pytest.importorskip("compressed_tensors")


def loaded(made: Path, **options: Any) -> Any:
    """The model, after a first pass, which unpacks its weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(made, **options)
    logits(model)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(12)[None]).logits.float()


def errors(made: Path) -> list[str]:
    with weft.open(made) as checkpoint:
        return [f.text for f in check_serving(checkpoint, "transformers") if f.level == "error"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=2, num_experts_per_tok=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mixture") / "model"
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        *(("W4A16", "auto"), ("W4A16_ASYM", "auto"), ("W8A8", "auto"), ("W8A8", "pack-quantized"), ("FP8", "auto")),
        *(("FP8_DYNAMIC", "auto"), ("FP8_BLOCK", "auto"), ("NVFP4A16", "auto"), ("MXFP4", "auto"), ("MXFP8", "auto")),
    ],
)
def test_experts(scheme: str, form: str, mixture: Path, tmp_path: Path) -> None:
    data = [{"input_ids": torch.arange(32)[None]}] if scheme == "FP8" else None
    made = quantize_model(mixture, tmp_path / "out", scheme, data, format=form)
    found = errors(made)
    try:
        experts = loaded(made).state_dict()
    except RuntimeError:
        assert len(found) == 1
        return
    with weft.open(made) as opened:
        mine = {n: opened[n].torch().bfloat16() for n in opened if ".experts." in n}
    prefix = "model.layers.0.block_sparse_moe.experts"
    same = [
        torch.equal(torch.cat([mine[f"{prefix}.{e}.w1.weight"], mine[f"{prefix}.{e}.w3.weight"]]), both)
        for e, both in enumerate(experts["model.layers.0.mlp.experts.gate_up_proj"])
    ]
    assert all(same) is not bool(found), (same, found)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bits", "kind"), [(8, "symmetric"), (4, "symmetric"), (8, "asymmetric")])
def test_embeddings(bits: int, kind: str, tied: bool, tmp_path: Path) -> None:
    """Of 8 bits, symmetric, they are bytes, which transformers loads where no head is tied to them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    wanted = {"*": RTN(4, 32, "symmetric"), "embed_tokens": RTN(bits, 32, kind)}
    made = quantize_model(tmp_path / "model", tmp_path / "out", wanted, format="pack-quantized")
    mine = load_quantized(made, backend="dequantize")
    found = errors(made)
    settings = json.loads((made / "config.json").read_text())["quantization_config"]
    assert settings["format"] == ("mixed-precision" if (bits, kind) == (8, "symmetric") else "pack-quantized")
    try:
        expected = logits(loaded(made))
    except (AttributeError, RuntimeError):
        assert found
        return
    assert not found
    torch.testing.assert_close(logits(mine), expected, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP8", "FP8_DYNAMIC"])
def test_models_in_float32(scheme: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    made = quantize_model(tmp_path / "model", tmp_path / "out", scheme)
    with weft.open(made) as checkpoint:
        warned = [f.text for f in check_serving(checkpoint, "transformers") if f.level == "warning"]
    if scheme == "FP8_DYNAMIC":
        assert not warned
        loaded(made)
        return
    assert "dtype=torch.bfloat16" in warned[0]
    with pytest.raises(RuntimeError, match="dtype"):
        loaded(made)
    loaded(made, dtype=torch.bfloat16)
