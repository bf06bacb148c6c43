"""Killed at any file operation or at any moment and run again, what takes long ends in the same bytes; so with a full disk.

What touches files is counted in a forked process, which is killed at one of these operations, or whose disk is full from there
on. A file that is written and not yet safe on disk may be cut in half by the kill.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "calibrate"))

CASES = ("gptq", "flexround", "rtn", "mixed", "collect", "compare")
AT_OPERATIONS, AT_MOMENTS, FULL = (int(n) for n in os.environ.get("WEFT_KILLS", "2,1,1").split(","))  # of each case
SPACE = ("write", "pwrite", "fsync", "fdatasync", "posix_fallocate", "mkdir", "open", "write_text")  # what takes some
Strike = Callable[[str, "int | str | None"], None]


def work(case: str, folder: Path, output: Path) -> None:
    """One of the cases, as a user calls it."""
    import torch

    from weft.calibrate import collect
    from weft.quantize import AWQ, GPTQ, RTN, VPTQ, FlexRound, quantize_model
    from weft.quantize.compare import compare_methods

    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(3, 64, (2, 9), generator=generator)} for _ in range(3)]
    config: Any = {
        "gptq": GPTQ(bits=4, group_size=16, kind="symmetric"),
        "flexround": FlexRound(bits=3, group_size=16, steps=3),
        "rtn": RTN(bits=4, group_size=16, kind="symmetric"),
        "mixed": {
            "*": AWQ(bits=4, group_size=16),
            "*.down_proj": VPTQ(length=4, entries=16),
            "lm_head": RTN(bits=8, group_size=16),
            "model.embed_tokens": RTN(bits=8, group_size=16),
        },
    }.get(case)
    if case == "collect":
        collect(folder / "model", batches, "gram,scales", output=output)
    elif case == "compare":
        candidates = {"gptq 4": GPTQ(bits=4, group_size=16), "rtn 8": RTN(bits=8, group_size=16)}
        compare_methods(folder / "model", candidates, batches[:2], batches[2:], output, mixed=[6.5])
    else:
        data = None if case == "rtn" else batches
        quantize_model(folder / "model", output, config, data, shard_bytes=40_000)


def digest(folder: Path) -> dict[str, str]:
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
    if (folder / "comparison.json").exists():  # which says how long it took and how fast models were
        value = json.loads((folder / "comparison.json").read_text())
        for row in [value, *value["rows"], value["original"]]:
            row.pop("seconds")
            for timing in ("seconds", "tokens_per_second"):
                row.get("scores", {}).pop(timing, None)
        found = {"comparison.json": json.dumps(value, sort_keys=True)}
    return found


class Operations:
    """Counts what this process does to files, and calls ``strike`` with the name of each operation from a number on.

    ``strike`` is also given the file that was written and is not synced yet, if the operation would sync one.
    """

    def __init__(self, folder: Path, number: int | None, strike: Strike):
        self.count, self.number, self.strike, self.folder = 0, number, strike, str(folder)
        for name in ("replace", "rename", "unlink", "remove", "rmdir", *SPACE[:-2]):
            setattr(os, name, self._counted(name, getattr(os, name)))
        plain = Path.write_text

        def write_text(path: Path, *args: Any, **kwargs: Any) -> int:
            written = plain(path, *args, **kwargs)
            self.step("write_text", str(path))
            return written

        Path.write_text = write_text  # type: ignore[method-assign,assignment]
        sys.addaudithook(self._opened)

    def step(self, name: str, unsynced: int | str | None = None) -> None:
        self.count += 1
        if self.number is not None and self.count >= self.number:
            self.strike(name, unsynced)

    def _counted(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            self.step(name, args[0] if name in ("fsync", "fdatasync") else None)
            return plain(*args, **kwargs)

        return operation

    def _opened(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and self.folder in str(args[0]) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.step("open")


def cut(unsynced: int | str | None, share: float) -> None:
    path = f"/proc/self/fd/{unsynced}" if isinstance(unsynced, int) else unsynced
    if path is not None and os.path.isfile(path):
        os.truncate(path, int(share * os.stat(path).st_size))


def die(name: str, unsynced: int | str | None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_torn(name: str, unsynced: int | str | None) -> None:
    cut(unsynced, 0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def full(name: str, unsynced: int | str | None) -> None:
    if name in SPACE:
        cut(unsynced if isinstance(unsynced, str) else None, 0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(
    case: str, folder: Path, output: Path, at: int | None = None, strike: Strike = die, after: float | None = None
) -> str:
    """Work in a forked process: ``killed``, ``done`` and after how many operations, or the error in words."""
    reading, writing = os.pipe()
    tell, child = os.write, os.fork()
    if child == 0:
        try:
            operations = Operations(folder, at, strike)
            work(case, folder, output)
        except BaseException as error:
            tell(writing, f"{type(error).__name__}: {error}\n{traceback.format_exc()}".encode()[:9000])
            os._exit(1)
        tell(writing, f"done {operations.count}".encode())
        os._exit(0)
    os.close(writing)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = os.read(reading, 9000).decode()
    os.close(reading)
    return "killed" if os.WIFSIGNALED(status) else said


def kills(folder: Path, seed: int) -> None:
    """Runs in a process without threads, so that it may fork; prints what happened."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    from architectures import build

    build("llama")[0].save_pretrained(folder / "model")
    choice, counts = random.Random(seed), {"killed": 0, "went on": 0, "full": 0, "trials": 0}
    for case in os.environ.get("WEFT_CASES", ",".join(CASES)).split(","):
        work(case, folder, folder / "warm")  # children inherit what is imported and compiled here
        expected = digest(folder / "warm")
        began = time.monotonic()
        ended = in_child(case, folder, folder / "out")
        whole = time.monotonic() - began
        assert ended.startswith("done"), ended
        assert digest(folder / "out") == expected
        count = int(ended.split()[1])
        counts[f"operations of {case}"] = count
        shutil.rmtree(folder / "out")
        every = range(1, count + 1)

        share = 2 if case == "compare" else 1  # it takes several times as long

        def chosen(number: int, every: range = every, share: int = share) -> list[int]:
            number = -(-number // share)
            return [*every] if number >= len(every) else choice.sample(every, number)

        trials: list[dict[str, Any]] = [
            {"at": k, "strike": choice.choice([die, die_torn])} for k in chosen(AT_OPERATIONS)
        ]
        trials += [{"after": choice.uniform(0, whole)} for _ in range(AT_MOMENTS)]
        trials += [{"at": k, "strike": full} for k in chosen(FULL)]
        for trial in trials:
            said = f"{case} {trial}"
            counts["trials"] += 1
            output = folder / "out"
            ended = in_child(case, folder, output, **trial)
            if trial.get("strike") is full:
                # near the end nothing needs space any more
                assert ended.startswith(("done", "OutputError")), f"{said}: {ended}"
                assert "done" in ended or ("No space left" in ended and " free" in ended), f"{said}: {ended}"
                counts["full"] += "OutputError" in ended
            else:
                assert ended.startswith(("done", "killed")), f"{said}: {ended}"
                counts["killed"] += ended == "killed"
            partial = folder / "out.partial"
            counts["went on"] += any(partial.glob("*/0*.safetensors")) or any(partial.glob("files/*"))
            if not ended.startswith("done"):
                assert not output.exists() or not any((partial / "files").glob("*")), f"{said}: half an output"
                ended = in_child(case, folder, output, **(trial if ended == "killed" and choice.random() < 0.2 else {}))
                if ended == "killed":
                    counts["killed"] += 1
                    ended = in_child(case, folder, output)
            if ended.startswith("OutputError") and "exists already" in ended and not (partial / "files").exists():
                ended = "done"  # it was killed behind its last step
            assert ended.startswith("done"), f"{said} again: {ended}"
            assert digest(output) == expected, f"{said}: other bytes in {output}"
            left = sorted(p.name for p in folder.iterdir())
            assert left == ["model", "out", "warm"], f"{said}: left {left}"
            shutil.rmtree(output)
        shutil.rmtree(folder / "warm")
    print(json.dumps(counts))


def test_killed_or_out_of_space_at_any_operation(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, __file__, str(tmp_path), "0"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.strip().splitlines()[-1])
    assert counts["killed"] >= 0.5 * len(CASES) * (AT_OPERATIONS + AT_MOMENTS), counts
    assert counts["full"] >= 0.5 * len(CASES) * FULL, counts
    assert counts["went on"] >= 3, counts


if __name__ == "__main__":
    kills(Path(sys.argv[1]), int(sys.argv[2]))
