"""Every method on a small model: written, read by transformers, and near the original."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))
from architectures import build

from weft.quantize import (
    GPTQ,
    HQQ,
    RTN,
    Codebook,
    codebook_codes,
    codebook_weight,
    dequantize,
    hqq_codes,
    quantize_codebook,
    quantize_gptq,
    quantize_hqq,
    quantize_rtn,
    round_to_nearest,
)

METHODS: dict[str, tuple[Callable[..., Any], Any, Callable[[Tensor], Tensor] | None]] = {
    "rtn": (quantize_rtn, RTN(4, 16), lambda w: round_to_nearest(w, RTN(4, 16))),
    "hqq": (quantize_hqq, HQQ(4, 16), lambda w: dequantize(hqq_codes(w, HQQ(4, 16)))),
    "nf4": (quantize_codebook, Codebook("nf4"), lambda w: codebook_weight(codebook_codes(w, Codebook("nf4")))),
    "fp4": (quantize_codebook, Codebook("fp4"), lambda w: codebook_weight(codebook_codes(w, Codebook("fp4")))),
    "gptq": (quantize_gptq, GPTQ(4, 16), None),  # depends on the data; its own test compares it
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_small_llama(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, batches = build("llama", dtype)
    model.save_pretrained(tmp_path / "model")
    write, config, by_hand = METHODS[method]
    data = [batches] if method == "gptq" else []
    made = write(tmp_path / "model", *data, tmp_path / "out", config)
    reread = type(model).from_pretrained(made).eval()
    report = json.loads((made / "weft.json").read_text())
    assert report["recipe"]["method"] == method
    changed = set(report["changed"])
    assert len(changed) == 3 * 7
    for (name, before), (_, after) in zip(model.named_parameters(), reread.named_parameters(), strict=True):
        assert after.dtype == dtype
        if name not in changed:
            assert torch.equal(before, after)
        elif by_hand is not None:
            assert torch.equal(by_hand(before.detach().float()).to(dtype), after)
        else:
            assert 0 < float(((before - after).norm() / before.norm()).detach()) < 0.2
    with torch.no_grad():
        a, b = model(**batches[0])[0].float(), reread(**batches[0])[0].float()
    assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.97
