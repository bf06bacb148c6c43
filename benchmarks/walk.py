"""Seconds and memory of a walk through a 3 B model on disk, with Gram matrices gathered and without.

python benchmarks/walk.py        writes benchmarks/results/walk.json; needs 18 GB of disk (6.3 for the model)
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

from resident import Memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results") / "walk.json"
BATCHES, TOKENS = 2, 64
KINDS = ("walk", "gram", "gram written")  # nothing gathered; gathered and forgotten; gathered and kept in a folder


def measure(model: Path, kind: str, output: Path) -> dict[str, float]:
    """One walk in this process."""
    memory = Memory()
    memory.start()
    import torch

    from weft.calibrate import Walk, collect

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 32_000, (1, TOKENS), generator=generator)} for _ in range(BATCHES)]
    from weft.calibrate.check import check_architecture
    from weft.calibrate.source import open_source
    from weft.calibrate.watch_block import watched

    source = open_source(model)
    check_architecture(type(source.model), source.model.config)  # done once a process; outside of the time
    before = memory.peak
    blocks, block_bytes = len(source.stacks[0]), sum(
        p.nbytes for p in source.model.get_submodule(source.stacks[0][0]).parameters()
    )  # fmt: skip
    began = time.monotonic()
    if kind == "walk":
        with Walk(model, batches) as walk:
            for _ in walk:
                pass
    elif kind == "gram":
        with Walk(model, batches) as walk:
            for block in walk:
                with watched(block, ["gram"]) as watch:
                    block.run(keep=True)
                for inputs in watch.inputs.values():
                    inputs.result()
    else:
        collect(model, batches, "gram", output=output)
    seconds = time.monotonic() - began
    return {
        "blocks": blocks,
        "block_MB": round(block_bytes / 1e6),
        "seconds": round(seconds, 1),
        "seconds_per_block": round(seconds / blocks, 2),
        "peak_MB": round(memory.peak / 1e6),
        "before_weights_MB": round(before / 1e6),
        "output_MB": round(sum(f.stat().st_size for f in output.rglob("*")) / 1e6) if output.exists() else 0,
    }


def main() -> None:
    """Write the model, measure twice, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=3e9)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="the others stay as they were measured")
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "KIND", "OUTPUT"))
    arguments = parser.parse_args()
    if arguments.measure:
        model, kind, output = arguments.measure
        print(json.dumps(measure(Path(model), kind, Path(output))))
        return
    work = Path(tempfile.mkdtemp(prefix="weft-walk-"))
    try:
        script = str(ROOT / "benchmarks" / "llama_shaped.py")
        size = ["--parameters", str(arguments.parameters), "--fine-tunes", "0"]
        subprocess.run([sys.executable, script, str(work), *size], check=True)
        rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
        for kind in arguments.only:
            command = [sys.executable, __file__, "--measure", str(work / "base"), kind, str(work / "stats")]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows[kind] = json.loads(out.splitlines()[-1])
            print(kind, rows[kind], flush=True)
        files = sum(f.stat().st_size for f in (work / "base").glob("*.safetensors"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    facts = {
        "what": "a Llama-shaped model in bfloat16 on disk, one thread; peak: resident memory without pages of files",
        "model_GB": round(files / 1e9, 2),
        "tokens": f"{BATCHES} × {TOKENS}",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "rows": {kind: rows[kind] for kind in KINDS if kind in rows},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
