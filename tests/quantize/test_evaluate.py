"""Scores equal their definitions, from memory, from disk and on packed weights."""

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

from weft.errors import RecipeError
from weft.quantize import RTN, evaluate, quantize_, quantize_model


def padded(batches: list[Any]) -> list[Any]:
    made = []
    for batch in batches:
        mask = torch.ones_like(batch["input_ids"])
        mask[0, -3:] = 0
        made.append({"input_ids": batch["input_ids"], "attention_mask": mask})
    return made


@torch.no_grad()
def test_a_language_model(tmp_path: Path) -> None:
    model, batches = build("llama", torch.float32)
    model.save_pretrained(tmp_path / "model")
    data = padded(batches)
    worse = copy.deepcopy(model)
    quantize_(worse, RTN(2, 16), backend="dequantize")
    losses, kl, agreed, tokens = [], 0.0, 0, 0
    for batch in data:
        p, q = model(**batch).logits.double(), worse(**batch).logits.double()
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool())):
            for place in range(len(ids)):
                if not mask[place]:
                    continue
                a, b = p[row, place].softmax(0), q[row, place].softmax(0)
                kl += float((a * (a / b).log()).sum())
                agreed += int(a.argmax() == b.argmax())
                tokens += 1
                if place + 1 < len(ids) and mask[place + 1]:
                    losses.append(-math.log(float(b[ids[place + 1]])))
    found = evaluate(worse, data, model)
    assert found["tokens"] == tokens
    assert found["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert found["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(agreed / tokens)
    made = quantize_model(tmp_path / "model", tmp_path / "out", RTN(2, 16), format="weft")
    on_disk = evaluate(made, data, tmp_path / "model", backend="dequantize")
    for key in ("nll", "kl", "top1_agreement", "output_error"):
        assert on_disk[key] == pytest.approx(found[key], rel=1e-4)
    same = evaluate(tmp_path / "model", data, model)
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    assert same["top1_agreement"] == 1


@torch.no_grad()
def test_an_encoder(tmp_path: Path) -> None:
    model, batches = build("bert", torch.float32)
    model.save_pretrained(tmp_path / "model")
    other = copy.deepcopy(model)
    quantize_(other, RTN(3, 16), pack=False)
    data = padded(batches)
    distances = []
    for batch in data:
        mask = batch["attention_mask"].unsqueeze(-1).double()
        a, b = ((m(**batch).last_hidden_state.double() * mask).sum(1) / mask.sum(1) for m in (model, other))
        distances += (1 - torch.cosine_similarity(a, b)).tolist()
    found = evaluate(other, data, tmp_path / "model")
    assert found["cosine_distance"] == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    assert "perplexity" not in found


def test_plain_modules_and_what_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    found = evaluate(nn.Linear(4, 3), [x], model)
    assert found["output_error"] > 0.1
    with pytest.raises(RecipeError, match="do not compare"):
        evaluate(nn.Linear(4, 2), [x], model)
    with pytest.raises(RecipeError, match="nothing to evaluate"):
        evaluate(model, [])


def test_a_model_that_gives_nan_is_not_perfect() -> None:
    model, batches = build("llama", torch.float32)
    other, _ = build("llama", torch.float32)
    with torch.no_grad():
        other.get_submodule("model.layers.0.mlp.up_proj").weight.fill_(math.nan)
    found = evaluate(other, batches, model)
    assert math.isnan(found["kl"])
    assert math.isnan(found["nll"])
