"""Codebooks and signs in models on disk: shared factors, blocks that are reconstructed, layers that few rows reached."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

from weft.calibrate import collect
from weft.quantize import JLCM, VPTQ, ShiftAdd, VQ4DiT, quantize_model, shiftadd_codes, shiftadd_sensitivity
from weft.quantize.vptq import column_factor, vptq_codes

CONFIGS = [
    VPTQ(length=2, entries=16, overhead=1e9),
    ShiftAdd(bits=3),
    ShiftAdd(bits=3, blocks="tile"),
    VQ4DiT(length=2, entries=16, overhead=1e9, steps=16),
    JLCM(levels=8, tables=2, steps=16),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__} {getattr(c, 'blocks', '')}".strip())
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_on_disk(name: str, config: Any, tmp_path: Path) -> None:
    model, batches = build(name)
    model.save_pretrained(tmp_path / "model")
    made = quantize_model(tmp_path / "model", tmp_path / "out", config, batches, format="dense")
    reread = type(model).from_pretrained(made).eval()
    layers = json.loads((made / "weft.json").read_text())["layers"]
    weights = {n: e for n, e in layers.items() if "bits" in e}
    assert weights
    assert all(0 < e["output_error"] < 0.5 for e in weights.values())
    if isinstance(config, VQ4DiT | JLCM):
        blocks = [e for e in layers.values() if "block_loss_before" in e]
        assert blocks
        assert all(e["block_loss"] <= e["block_loss_before"] for e in blocks)
    with torch.no_grad():
        a, b = model(**batches[0])[0], reread(**batches[0])[0]
    assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.8


def test_layers_with_equal_inputs_share_a_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first block, whose inputs are the original's, layers are those of the pure functions."""
    model, batches = build("llama")
    model.save_pretrained(tmp_path / "model")
    counted = []
    for module in ("vptq", "shiftadd"):
        monkeypatch.setattr(
            sys.modules[f"weft.quantize.{module}"],
            "column_factor",
            lambda *a: (counted.append(1), column_factor(*a))[1],
        )
    statistics = collect(model, batches, "gram")
    path = next(n for n in statistics.layers if "0." in n and n.endswith("k_proj"))
    seen, gram = model.get_submodule(path).weight.detach(), statistics.gram(path)
    vectors, signs = VPTQ(length=2, entries=2, overhead=1e9), ShiftAdd(bits=2)
    first = quantize_model(tmp_path / "model", tmp_path / "vectors", vectors, batches, format="dense", autocast=False)
    assert len(counted) == 3 * 4  # query, key and value; output; gate and up; down
    second = quantize_model(tmp_path / "model", tmp_path / "signs", signs, batches, format="dense", autocast=False)
    assert len(counted) == 2 * 3 * 4
    entry = json.loads((first / "weft.json").read_text())["layers"][path]
    new = type(model).from_pretrained(first).get_submodule(path).weight.detach()
    vectors_of = vptq_codes(seen, gram, vectors, torch.Generator())  # two vectors: other draws, near the same loss
    assert len(new.T.reshape(-1, 2).unique(dim=0)) == 2
    assert entry["loss"] == pytest.approx(float(vectors_of.loss), rel=0.3)
    entry = json.loads((second / "weft.json").read_text())["layers"][path]
    new = type(model).from_pretrained(second).get_submodule(path).weight.detach()
    torch.testing.assert_close(new, shiftadd_codes(seen, gram, signs).packed.dequantize(), rtol=1e-3, atol=1e-3)
    assert entry["sensitivity"] == pytest.approx(float(shiftadd_sensitivity(seen, gram)), rel=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_without_data(config: Any) -> None:
    """What is done to layers that few rows reached reads no statistics."""
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    instead = config.without_data()
    assert not instead.needs
    nothing: Any = None
    found = instead.fit("layer", weight, nothing).dequantize()
    assert float((found - weight).norm() / weight.norm()) < 0.6
