"""Killed at any moment and run again, a merge ends in the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

KILLS = 52
TENSORS, ROWS, COLUMNS = 24, 256, 1024


def make_inputs(folder: Path) -> None:
    from safetensors.numpy import save_file

    for model in range(3):
        values = np.random.default_rng(model)
        tensors = {f"layers.{i}.w": values.standard_normal((ROWS, COLUMNS)).astype(np.float32) for i in range(TENSORS)}
        (folder / f"m{model}").mkdir()
        save_file(tensors, str(folder / f"m{model}" / "model.safetensors"))
        (folder / f"m{model}" / "config.json").write_text("{}")


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def merge(folder: Path, output: Path) -> None:
    import weft
    from weft.engine.run import Options

    recipe = {
        "steps": [
            {
                "method": "ties",
                "models": [str(folder / "m1"), str(folder / "m2")],
                "base": str(folder / "m0"),
                "parameters": {"density": 0.4},
            }
        ],
        "output": {"shard_size": "8MB"},
    }
    weft.run(recipe, output, options=Options(threads=2, commit_bytes=2_000_000))


def in_child(folder: Path, output: Path, kill_after: float | None) -> bool:
    """Merge in a forked process; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            merge(folder, output)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the merge failed"
    return not os.WIFSIGNALED(status)


def main(folder: Path) -> None:
    """Runs in a process without threads, so that it may fork; prints what happened."""
    make_inputs(folder)
    in_child(folder, folder / "warm", None)  # compiles the kernels
    import weft.merge
    import weft.recipe.run  # children inherit what is imported and loaded here

    weft.merge.ties([np.ones(3, np.float32)] * 2, density=0.5)
    began = time.monotonic()
    in_child(folder, folder / "whole", None)
    whole = time.monotonic() - began  # kills fall into this span; shortened when a run proves shorter
    expected = digest(folder / "whole")
    choice = random.Random(0)
    killed = resumed = trial = 0
    while killed < KILLS:
        trial += 1
        output = folder / f"out{trial}"
        for _ in range(choice.choice([1, 1, 2])):
            killed += not in_child(folder, output, choice.uniform(0, whole))
            if output.exists():
                break
            resumed += (folder / f"out{trial}.partial" / "journal").exists()
        if not output.exists() or (folder / f"out{trial}.partial").exists():
            began = time.monotonic()
            in_child(folder, output, None)
            whole = max(0.02, min(whole, time.monotonic() - began))
        assert digest(output) == expected, f"trial {trial} ended in other bytes"
        assert not (folder / f"out{trial}.partial").exists(), f"trial {trial} left its work folder"
        for path in output.iterdir():
            path.unlink()
    print(json.dumps({"killed": killed, "resumed": resumed, "trials": trial}))


def test_kill(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.strip().splitlines()[-1])
    assert counts["killed"] >= 50, counts
    assert counts["resumed"] >= 5, counts


if __name__ == "__main__":
    main(Path(sys.argv[1]))
