"""Peak resident memory of merges of a 0.1 B and a 1 B model with the default settings.

python benchmarks/memory.py        writes benchmarks/results/memory.json; needs 12 GB of disk
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from merge_vs_mergekit import BIN

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results") / "memory.json"
METHODS = ("linear", "slerp", "ties", "mergekit/ties", "mergekit/dare_ties")


def command(method: str, models: Path, output: Path) -> list[str]:
    """A merge of three fine-tunes (slerp: one) as a user types it."""
    tuned = [str(models / f"ft{i}") for i in range(1 if method == "slerp" else 3)]
    base = [] if method == "linear" else ["--base", str(models / "base")]
    base += ["--t", "0.5"] if method == "slerp" else []
    return [str(BIN / "weft"), "merge", *tuned, *base, "--method", method, "-o", str(output), "--quiet"]


def peak_resident(command: list[str]) -> int:
    """Peak resident bytes of a command, pages of its libraries included."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024


def main() -> None:
    """Measure and write."""
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for parameters in (0.13e9, 1.2e9):
        work = Path(tempfile.mkdtemp(prefix="weft-memory-"))
        try:
            script = str(ROOT / "benchmarks" / "llama_shaped.py")
            subprocess.run([sys.executable, script, str(work), "--parameters", str(parameters)], check=True)
            for method in METHODS:
                run = command(method, work, work / "out")
                plan = subprocess.run([*run, "--dry-run", "--json"], capture_output=True, text=True, check=True).stdout
                peak = peak_resident(run)
                shutil.rmtree(work / "out")
                facts = json.loads(plan)
                size = f"{facts['parameters'] / 1e9:.2f} B"
                rows.setdefault(method, {})[size] = {
                    "peak_MB": round(peak / 1e6),
                    "estimate_MB": round(facts["memory_bytes"] / 1e6),
                }
                print(method, size, rows[method][size], flush=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"what": "resident memory of whole commands, default settings", "methods": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
