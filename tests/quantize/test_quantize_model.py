"""Every method on a small model: written, read by transformers, and near the original."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

from weft.calibrate import Change, Statistics
from weft.calibrate.facts import Facts
from weft.packed import Packed
from weft.quantize import GPTQ, HQQ, RTN, Codebook, quantize_model

METHODS: dict[str, Change] = {
    "rtn": RTN(4, 16),
    "hqq": HQQ(4, 16),
    "nf4": Codebook("nf4"),
    "fp4": Codebook("fp4"),
    "gptq": GPTQ(4, 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_small_llama(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, batches = build("llama", dtype)
    model.save_pretrained(tmp_path / "model")
    config = METHODS[method]
    made = quantize_model(
        tmp_path / "model", tmp_path / "out", config, batches if config.needs else None, format="dense"
    )
    reread = type(model).from_pretrained(made).eval()
    report = json.loads((made / "weft.json").read_text())
    assert report["recipe"]["config"] == type(config).__name__
    changed = set(report["changed"])
    assert len(changed) == 3 * 7
    for (name, before), (_, after) in zip(model.named_parameters(), reread.named_parameters(), strict=True):
        assert after.dtype == dtype
        if name not in changed:
            assert torch.equal(before, after)
        elif not config.needs:
            packed = config.fit(name, before.detach().float(), Statistics({}, Facts()))
            assert isinstance(packed, Packed)
            assert torch.equal(packed.dequantize().to(dtype), after)
        else:
            assert 0 < float(((before - after).norm() / before.norm()).detach()) < 0.2
    with torch.no_grad():
        a, b = model(**batches[0])[0].float(), reread(**batches[0])[0].float()
    assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.97
