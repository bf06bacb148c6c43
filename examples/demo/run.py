"""Three teams fine-tune one pretrained transformer on their own data; weft makes one model of the three.

Each team teaches MiniLM-L6 to tell three packages of Python's standard library apart. No team sees the others' data.
Their models are merged from the command line and asked about all nine packages. ``--quick`` runs a small version.
Afterwards ``cp examples/demo/out/demo.* docs/`` renews what the documentation shows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from data import PACKAGES, TEAMS, corpus
from experiment import FROZEN_TENSORS, MERGES, recipe, run_seed
from model import encode, make_start
from picture import draw
from report import conclusions, summarise, table

HERE = Path(__file__).resolve().parent


def prepare(out: Path, per_package: int) -> None:
    """The common start, and what its frozen layers make of all texts."""
    out.mkdir(parents=True, exist_ok=True)
    for old in ["start", *TEAMS, *map(folder_name, MERGES)]:
        shutil.rmtree(out / old, ignore_errors=True)
    texts, labels = corpus(per_package)
    print(f"{len(texts)} functions from {len(PACKAGES)} packages, for example:\n  {texts[0][:96]} …")
    make_start(out / "start")
    torch.save({**encode(out / "start", texts), "labels": torch.from_numpy(labels)}, out / "features.pt")
    (out / "settings.json").write_text(json.dumps({"per_package": per_package}))
    print(f"MiniLM-L6 with a head for {len(PACKAGES)} packages is saved as {out / 'start'}", flush=True)


def folder_name(name: str) -> str:
    """Name of a merge's folder."""
    return name.lower().replace(" ", "-")


def type_in(command: str, out: Path, show: str = "") -> None:
    """Print a command, run it in ``out`` and print its answer, or only the part that begins with ``show``."""
    print(f"\n$ {command}", flush=True)
    words = shlex.split(command)
    program = {"weft": [str(Path(sys.executable).parent / "weft")], "python": [sys.executable]}[words[0]]
    answer = subprocess.run([*program, *words[1:]], cwd=out, stdout=subprocess.PIPE, text=True, check=True).stdout
    parts = [part for part in answer.rstrip().split("\n\n") if part.startswith(show)]
    print("\n".join(["…", *parts, "…"] if show else parts), flush=True)


def merge_on_the_command_line(out: Path, chosen: dict[str, Any]) -> None:
    """Seed 0's specialists become one model, once for each method; settings as chosen on validation texts."""
    print("\nIn", os.path.relpath(out))
    type_in("weft inspect team-a --limit 1", out, show="layer ")
    type_in("weft diff start team-a --limit 1", out, show="layer ")
    print("\nThe frozen layers need no merging: --exclude copies them, and a density counts what was tuned.")
    for name, settings in chosen.items():
        made = recipe(name, settings)
        folder = folder_name(name)
        if "merge_method" in made:
            (out / "mergekit.yml").write_text(yaml.safe_dump(made, sort_keys=False))
            type_in(f"weft run mergekit.yml -o {folder}", out)
        elif name == "PCB":
            (out / "recipe.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
            type_in(f"weft run recipe.yaml -o {folder}", out)
        else:
            step = made["steps"][0]
            words = ["weft", "merge", *TEAMS, "--method", step["method"]]
            words += ["--base", "start"] if "base" in step else []
            words += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
            words += [word for pattern in FROZEN_TENSORS for word in ("--exclude", pattern)]
            type_in(shlex.join([*words, "-o", folder]), out)
    type_in(f"python {os.path.relpath(HERE / 'score.py', out)} team-a average", out)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: only to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder for models, table and picture")
    options = parser.parse_args()
    started = time.time()
    out, quick = options.out.resolve(), options.quick
    seeds, steps = (1, 2) if quick else (5, 20)

    prepare(out, per_package=20 if quick else 200)
    print(f"\nFine-tuning three specialists, {steps} steps each, {seeds} seed{'s' if seeds > 1 else ''}:", flush=True)
    if quick:
        runs = [run_seed(0, out, steps, quick)]
        merge_on_the_command_line(out, runs[0]["chosen"])
    else:
        with ProcessPoolExecutor(min(seeds, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(run_seed, seed, out, steps, quick) for seed in range(seeds)]
            merge_on_the_command_line(out, jobs[0].result()["chosen"])
            print("\nThe other seeds:", flush=True)
            runs = [job.result() for job in jobs]

    summary = summarise(runs)
    print(f"\nAccuracy in %\n{table(summary)}\n\n{conclusions(summary)}")
    (out / "demo.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "demo.svg").write_text(draw(summary))
    print(f"\nPicture: {out / 'demo.svg'}   numbers: {out / 'demo.json'}   {time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()
