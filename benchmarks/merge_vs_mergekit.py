"""Whole merges side by side with mergekit: seconds, peak memory, and the share of what reading and writing cost.

    make bench        or:  python benchmarks/merge_vs_mergekit.py --repeats 3 --parameters 0.5e9

Both tools run the same mergekit file, as commands, alternating, on warm files; weft runs its own recipe of each method
as well. Results go to ``benchmarks/results/merge_vs_mergekit.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results") / "merge_vs_mergekit.json"
BIN = Path(sys.executable).parent
WEIGHTS = (0.5, 0.3, 0.4)
MARKS = ("<!-- merge table: written by benchmarks/merge_vs_mergekit.py -->", "<!-- end of merge table -->")
GOALS = {"linear": 4, "task_arithmetic": 8, "slerp": 20, "dare_ties": 30, "ties": 40}


def configuration(method: str, models: Path) -> dict[str, Any]:
    """A mergekit file of three fine-tunes (slerp: the base and one)."""
    base = str(models / "base")
    tuned = [str(models / f"ft{i}") for i in range(3)]
    if method == "slerp":
        return {
            "merge_method": "slerp",
            "base_model": base,
            "models": [{"model": base}, {"model": tuned[0]}],
            "parameters": {"t": 0.4},
            "dtype": "bfloat16",
        }
    parameters: dict[str, Any] = {"density": 0.5} if method in ("ties", "dare_ties") else {}
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": m, "parameters": {"weight": w, **parameters}} for m, w in zip(tuned, WEIGHTS)],
        "dtype": "bfloat16",
    }
    if method != "linear":
        config["base_model"] = base
    return config


def measure(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, int, str]:
    """Wall seconds, peak resident bytes without mapped files, and the output of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(environment or {})}
    )
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.is_set():
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            stop.wait(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    return seconds, peak, output


def floor(models: Path, work: Path, method: str) -> float:
    """Seconds to read the inputs of a method with positioned reads and to write and sync an output, on one thread."""
    folders = {"slerp": ["base", "ft0"], "linear": ["ft0", "ft1", "ft2"]}.get(method, ["base", "ft0", "ft1", "ft2"])
    buffer = bytearray(16 << 20)
    began = time.perf_counter()
    for folder in folders:
        for path in sorted((models / folder).glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    total = sum(p.stat().st_size for p in (models / "base").glob("*.safetensors"))
    with (work / "floor").open("wb", buffering=0) as file:
        for _ in range(math.ceil(total / len(buffer))):
            file.write(buffer)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    (work / "floor").unlink()
    return seconds


def start_up() -> dict[str, float]:
    """Seconds that each tool needs before it touches a model."""
    code = "import weft.recipe.run, weft.merge, weft.registry; weft.registry.method('linear')"
    weft = min(measure([sys.executable, "-c", code])[0] for _ in range(3))
    mergekit = min(measure([str(BIN / "mergekit-yaml"), "--help"])[0] for _ in range(2))
    help_only = min(measure([str(BIN / "weft"), "--help"])[0] for _ in range(5))
    return {"weft": round(weft, 3), "mergekit": round(mergekit, 3), "weft --help": round(help_only, 3)}


def interval(ratios: list[float]) -> list[float] | None:
    """95% confidence interval of the mean log ratio, as ratios; None for fewer than three runs."""
    if len(ratios) < 3:
        return None
    from scipy.stats import t

    logs = [math.log(r) for r in ratios]
    half = t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.mean(logs)
    return [round(math.exp(mean - half), 2), round(math.exp(mean + half), 2)]


def table(result: dict[str, Any]) -> str:
    """The README's table from the committed result."""
    lines = [
        f"{result['model']}; {result['machine']}; whole commands, warm files, median of "
        f"{len(next(iter(result['methods'].values()))['weft_seconds'])} alternating runs. Peak is {result['peak']}.",
        "",
        "| method | weft | mergekit 0.1.5 | faster | 95% interval | without start-up | peak weft | peak mergekit | share of the read-and-write floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, row in result["methods"].items():
        ours, theirs = (statistics.median(row[k]) for k in ("weft_seconds", "mergekit_seconds"))
        interval = "–".join(f"{v:g}" for v in row["times_faster_95"]) if row["times_faster_95"] else "one run"
        lines.append(
            f"| {method} | {ours:.1f} s | {theirs:.0f} s | {row['times_faster']:g}× | {interval} "
            f"| {row['times_faster_without_start_up']:g}× | {row['weft_peak_MB']} MB | {row['mergekit_peak_MB']} MB "
            f"| {row['share_of_floor']:.0%} |"
        )
    return "\n".join(lines)


def update_readme(result: dict[str, Any]) -> None:
    """Put the table between its marks."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    readme.write_text(f"{before}{MARKS[0]}\n{table(result)}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=0.5e9)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default=",".join(GOALS))
    parser.add_argument("--models", type=Path, help="folder with base, ft0, ft1, ft2 (made if missing)")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="weft-bench-"))
    models = arguments.models or work / "models"
    if not (models / "base").exists():
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "benchmarks" / "llama_shaped.py"),
                str(models),
                "--parameters",
                str(arguments.parameters),
            ],
            check=True,
        )
    starts = start_up()
    rows = {}
    try:
        for method in arguments.methods.split(","):
            file = work / f"{method}.yml"
            file.write_text(yaml.safe_dump(configuration(method, models)))
            ours, theirs = [], []
            for repeat in range(arguments.repeats + 1):  # the first round warms files and compiled kernels
                shutil.rmtree(work / "weft", ignore_errors=True)
                seconds, memory, _ = measure([str(BIN / "weft"), "run", str(file), "-o", str(work / "weft"), "--quiet"])
                if repeat:
                    ours.append((seconds, memory))
                    shutil.rmtree(work / "mergekit", ignore_errors=True)
                    command = [
                        str(BIN / "mergekit-yaml"),
                        str(file),
                        str(work / "mergekit"),
                        "--allow-crimes",
                        "--quiet",
                    ]
                    theirs.append(measure(command, {"HF_HUB_OFFLINE": "1"})[:2])
            ratios = [t[0] / o[0] for o, t in zip(ours, theirs)]
            work_only = [(t[0] - starts["mergekit"]) / (o[0] - starts["weft"]) for o, t in zip(ours, theirs)]
            least = floor(models, work, method)
            best = statistics.median(s for s, _ in ours)
            rows[method] = {
                "weft_seconds": [round(s, 2) for s, _ in ours],
                "mergekit_seconds": [round(s, 2) for s, _ in theirs],
                "times_faster": round(statistics.median(ratios), 1),
                "times_faster_95": interval(ratios),
                "times_faster_without_start_up": round(statistics.median(work_only), 1),
                "goal": GOALS[method],
                "weft_peak_MB": round(max(m for _, m in ours) / 1e6),
                "mergekit_peak_MB": round(max(m for _, m in theirs) / 1e6),
                "floor_seconds": round(least, 2),
                "share_of_floor": round(least / best, 2),
            }
            print(method, json.dumps(rows[method]), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    result = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "commit": commit,
        "model": "Llama-shaped, 0.48 B bfloat16 parameters, 3 fine-tunes and base",
        "peak": "resident memory without file pages",
        "start_up_seconds": starts,
        "methods": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    update_readme(result)


if __name__ == "__main__":
    main()
