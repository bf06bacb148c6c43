"""Quantising a model of 3 B parameters on disk: peak memory against the estimate that was printed before, seconds, size.

python benchmarks/quantize_memory.py        writes benchmarks/results/quantize_memory.json; needs 10 GB of disk, half an hour

GPTQ to 4 bits in groups of 128 from 8 × 128 tokens, and rounding to nearest without data. Memory: the largest resident memory
without pages of files. The estimate is what ``weft quantize --dry-run`` prints.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llama_shaped import write_model
from resident import Memory

RESULTS = Path(__file__).with_name("results") / "quantize_memory.json"
BATCHES, TOKENS = 8, 128
KINDS = ("rtn", "gptq")


def measure(model: Path, kind: str, output: Path) -> dict[str, float]:
    """One run in this process."""
    memory = Memory()
    memory.start()
    import torch

    import weft
    from weft.quantize import GPTQ, RTN, quantize_model
    from weft.quantize.plan import plan_quantization

    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 32_000, (1, TOKENS), generator=generator)} for _ in range(BATCHES)]
    config = GPTQ(4, 128, "symmetric") if kind == "gptq" else RTN(4, 128, "symmetric")
    data = batches if kind == "gptq" else None
    with weft.open(model) as checkpoint:
        plan = plan_quantization(checkpoint, config, data, memory=1 << 28)
    began = time.monotonic()
    quantize_model(model, output, config, data, memory=1 << 28)
    seconds = time.monotonic() - began
    size = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    return {
        "seconds": round(seconds, 1),
        "estimate_MB": round(plan["memory"] / 1e6),
        "peak_MB": round(memory.peak / 1e6),
        "estimate_over_peak": round(plan["memory"] / memory.peak, 3),
        "estimated_output_MB": round(plan["bytes"] / 1e6),
        "output_MB": round(size / 1e6),
    }


def main() -> None:
    """Write the model, measure twice, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=3.14e9)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="the others stay as they were measured")
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "KIND", "OUTPUT"))
    arguments = parser.parse_args()
    if arguments.measure:
        model, kind, output = arguments.measure
        print(json.dumps(measure(Path(model), kind, Path(output))))
        return
    work = Path(tempfile.mkdtemp(prefix="weft-quantize-"))
    try:
        layers = max(1, round(arguments.parameters / 3.14e9 * 26))
        write_model(work / "base", {"hidden": 3072, "intermediate": 8192, "layers": layers}, seed=0, shards=4, change=0)
        rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
        for kind in arguments.only:
            command = [sys.executable, __file__, "--measure", str(work / "base"), kind, str(work / kind)]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows[kind] = json.loads(out.splitlines()[-1])
            print(kind, rows[kind], flush=True)
            shutil.rmtree(work / kind)
        files = sum(f.stat().st_size for f in (work / "base").glob("*.safetensors"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    facts = {
        "what": "a Llama-shaped model in bfloat16 on disk; peak: resident memory without pages of files",
        "model_GB": round(files / 1e9, 2),
        "tokens": f"{BATCHES} × {TOKENS}",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "rows": {kind: rows[kind] for kind in KINDS if kind in rows},
    }
    RESULTS.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
