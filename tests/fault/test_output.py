"""Full disks, two runs on one output, changed recipes, and bytes that depend on nothing but the recipe."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weft
from weft.engine import run as engine_run
from weft.engine.journal import WorkFolder
from weft.engine.run import Options
from weft.errors import OutputError


@pytest.fixture
def models(tmp_path: Path, llama_folder: Callable[..., Path]) -> list[Path]:
    return [llama_folder(tmp_path / f"m{i}", seed=i, hidden=32, vocabulary=64) for i in range(3)]


def recipe(models: list[Path], method: str = "ties", **parameters: Any) -> dict[str, Any]:
    return {
        "steps": [
            {"method": method, "models": [str(m) for m in models[1:]], "base": str(models[0]), "parameters": parameters}
        ],
        "output": {"shard_size": "20KB"},
    }


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB, or a skip where this user may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_is_told_at_the_start(models: list[Path], small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_disk / "filler").write_bytes(bytes(150_000))
    for look_ahead in (True, False):  # first the check of free space, then the reservation itself
        if not look_ahead:
            monkeypatch.setattr(engine_run, "_check_space", lambda *_: None)
        with pytest.raises(OutputError, match=r"free|No space|no room"):
            weft.run(recipe(models, density=0.5), small_disk / "out")
        assert [p.name for p in small_disk.iterdir() if p.name.startswith("out")] == []


def test_file_size_limit(models: list[Path], tmp_path: Path) -> None:
    code = (
        "import resource, sys, signal, weft\n"
        "from weft.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import weft.merge; weft.merge.linear([__import__('numpy').ones(3, 'float32')])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n"
        "    weft.run({'steps': [{'method': 'linear', 'models': sys.argv[2:]}]}, sys.argv[1])\n"
        "except OutputError as error:\n"
        "    print('told:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), str(models[0]), str(models[1])],
        capture_output=True,
        text=True,
    )
    assert "told:" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_two_runs_on_one_output(models: list[Path], tmp_path: Path) -> None:
    other = WorkFolder(tmp_path / "out")
    other.acquire()
    with pytest.raises(OutputError, match="another run"):
        weft.run(recipe(models), tmp_path / "out")
    other.remove()
    weft.run(recipe(models), tmp_path / "out")
    assert (tmp_path / "out" / "weft.json").is_file()


def interrupt(models: list[Path], output: Path, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> int:
    """Stop a run after its first commit, as Ctrl-C does; the number of tensors that were committed."""
    real, committed = engine_run._commit, 0

    def commit(ready: dict[str, str], *arguments: Any) -> None:
        nonlocal committed
        real(ready, *arguments)
        committed = len(ready)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine_run, "_commit", commit)
        with pytest.raises(KeyboardInterrupt):
            weft.run(recipe(models, **parameters), output, options=Options(threads=1, commit_bytes=1))
    return committed


def test_resume_is_refused_for_another_recipe(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(models, tmp_path / "out", monkeypatch, density=0.5)
    with pytest.raises(OutputError, match=r"density: was 0\.5, is 0\.6"):
        weft.run(recipe(models, density=0.6), tmp_path / "out")
    weft.run(recipe(models, density=0.6), tmp_path / "out", force=True)
    weft.run(recipe(models, density=0.6), tmp_path / "again")
    assert digests(tmp_path / "out") == digests(tmp_path / "again")


def test_resume_is_refused_for_changed_inputs(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(models, tmp_path / "out", monkeypatch)
    os.utime(models[1] / "model.safetensors", ns=(1, 1))
    with pytest.raises(OutputError, match="inputs"):
        weft.run(recipe(models), tmp_path / "out")


def test_resume_keeps_what_is_done(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = interrupt(models, tmp_path / "out", monkeypatch)
    result = weft.run(recipe(models), tmp_path / "out")
    assert result.resumed == committed > 0
    weft.run(recipe(models), tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_damaged_journal_starts_over(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(models, tmp_path / "out", monkeypatch)
    journal = tmp_path / "out.partial" / "journal"
    journal.write_bytes(b"\0\0" + journal.read_bytes())
    assert weft.run(recipe(models), tmp_path / "out").resumed == 0


@pytest.mark.parametrize("method", ["linear", "ties", "mergekit/ties", "dare_ties", "slerp", "sce", "pcb", "della"])
def test_same_recipe_same_bytes(method: str, models: list[Path], tmp_path: Path) -> None:
    data = recipe(models, method)
    if method in ("linear",):
        del data["steps"][0]["base"]
    if method == "slerp":
        data["steps"][0] |= {"models": [str(models[1])], "parameters": {"t": 0.3}}
    outputs = []
    for threads, memory in ((1, 512_000_000), (8, 512_000_000), (3, 1)):
        output = tmp_path / f"t{threads}-{memory}"
        weft.run(data, output, threads=threads, memory=memory)
        outputs.append(digests(output))
    assert outputs[0] == outputs[1] == outputs[2]


def test_outputs_hold_no_paths(models: list[Path], tmp_path: Path) -> None:
    weft.run(recipe(models), tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_transformers_and_safetensors_read_it(models: list[Path], tmp_path: Path) -> None:
    from safetensors import safe_open

    weft.run({"steps": [{"method": "linear", "models": [str(m) for m in models]}]}, tmp_path / "out")
    with safe_open(str(tmp_path / "out" / "model.safetensors"), "np") as written:
        assert written.metadata()["format"] == "pt"
        assert np.isfinite(written.get_tensor("model.norm.weight")).all()


# VmHWM belongs to the program; getrusage's figure would carry over from this test process
PEAK = """
import sys, weft
steps = [{"name": "a", "method": "ties", "models": sys.argv[4:], "base": sys.argv[3], "parameters": {"density": 0.5}}]
if sys.argv[1] == "chain":
    steps += [
        {"name": "b", "method": "mergekit/ties", "models": ["@a", sys.argv[4]], "base": sys.argv[3]},
        {"method": "slerp", "models": ["@b"], "base": "@a", "parameters": {"t": 0.5}},
    ]
weft.run({"steps": steps}, sys.argv[2])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.parametrize("kind", ["one step", "chain"])
def test_peak_memory_does_not_grow_with_the_model(kind: str, tmp_path: Path, llama_folder: Callable[..., Path]) -> None:
    """Ten times the layers, the same peak: what is held depends on the largest tensor and the budget alone."""
    peaks = []
    for layers in (2, 20):
        folder = tmp_path / str(layers)
        inputs = [llama_folder(folder / f"m{i}", seed=i, layers=layers, hidden=512, vocabulary=1000) for i in range(3)]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, kind, str(folder / "out"), *map(str, inputs)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] < 600_000_000
    assert peaks[1] - peaks[0] < 30_000_000, peaks  # allocator noise; the larger model is 170 MB larger
