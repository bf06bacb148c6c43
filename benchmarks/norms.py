"""What RMS norm and CRMS norm save at inference: time of converted models in parts of the time with layer norm.

python benchmarks/norms.py        writes benchmarks/results/norms.json; takes about two minutes

Each round runs every model once, in another order, and gives one ratio per norm; reported are the median of the ratios
and a 95% interval of it by resampling rounds, so a shared machine widens the interval and does not shift it. The norms
alone are measured in the same way, to show what the best case is.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.normalize import CRMSNorm, RMSNorm, convert_to_crms_, convert_to_rms_

RESULTS = Path(__file__).with_name("results") / "norms.json"


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    """GPT-2's shape, half as deep and wide, and its head with its own weights."""
    import transformers

    config = transformers.GPT2Config(
        n_embd=384, n_head=6, n_layer=6, vocab_size=2000, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 2000, (1, 256))}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT-Ti/16 on pictures of 224 x 224, half as deep."""
    import transformers

    config = transformers.ViTConfig(hidden_size=192, intermediate_size=768, num_attention_heads=3, num_hidden_layers=6)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 224, 224)}


def calls(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """The model with each norm."""
    made = {"layer_norm": model, "rms_norm": copy.deepcopy(model), "crms_norm": copy.deepcopy(model)}
    convert_to_rms_(made["rms_norm"])
    convert_to_crms_(made["crms_norm"])
    outputs = {name: m.eval()(**inputs).logits for name, m in made.items()}
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs["layer_norm"], rtol=1e-4, atol=1e-4, msg=name)
    return {name: partial(m, **inputs) for name, m in made.items()}


def layers(width: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """The norms alone."""
    x, narrow = torch.randn(1, tokens, width), torch.randn(1, tokens, width - 1)
    norms = {"layer_norm": nn.LayerNorm(width), "rms_norm": RMSNorm(width)}
    made: dict[str, Callable[[], Any]] = {name: partial(m, x) for name, m in norms.items()}
    crms = CRMSNorm(width - 1, affine=False)
    return {**made, "crms_norm": lambda: crms(narrow)}


def measured(ways: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Milliseconds of each way, and ratios to the first with an interval."""
    order = list(ways)
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    until = time.perf_counter() + seconds
    shuffle = random.Random(0)
    while time.perf_counter() < until:
        shuffle.shuffle(order)
        for name in order:
            began = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - began)
    plain = torch.tensor(times["layer_norm"], dtype=torch.float64)
    result: dict[str, Any] = {"rounds": len(plain), "least_ms": {n: round(min(t) * 1e3, 3) for n, t in times.items()}}
    picks = torch.randint(0, len(plain), (2000, len(plain)), generator=torch.Generator().manual_seed(0))
    for name in list(ways)[1:]:
        ratios = torch.tensor(times[name], dtype=torch.float64) / plain
        drawn = ratios[picks].median(dim=1).values
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        result[f"{name}/layer_norm"] = {
            "median": round(float(ratios.median()), 4), "interval_95": [round(low, 4), round(high, 4)]
        }  # fmt: skip
    return result


def table(result: dict[str, Any]) -> str:
    """The measurements as the documentation shows them."""
    rows = ["| | RMS norm | CRMS norm |", "|---|---|---|"]
    for name, row in result.items():
        if isinstance(row, dict):
            cells = []
            for norm in ("rms_norm", "crms_norm"):
                ratio = row[f"{norm}/layer_norm"]
                cells.append("{:.2f} [{:.2f}, {:.2f}]".format(ratio["median"], *ratio["interval_95"]))
            rows.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="for each of the two models; norms alone a tenth")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, 1 thread",
        "load_before": round(os.getloadavg()[0], 2),
        "what": "time of one forward pass in float32, in parts of the time with layer norm; median and 95% interval",
        "GPT-2-shaped, 6 x 384, 256 tokens": measured(calls(*gpt2()), arguments.seconds),
        "ViT-shaped, 6 x 192, 2 x 197 tokens": measured(calls(*vit()), arguments.seconds),
        "norm alone, 256 x 384": measured(layers(384, 256), arguments.seconds / 10),
        "norm alone, 394 x 192": measured(layers(192, 394), arguments.seconds / 10),
    }
    print(table(result))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
