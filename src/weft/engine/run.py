"""Carry out a plan: reserve, compute in threads, commit in groups, verify, publish.

A run that is killed leaves ``OUT.partial`` behind and resumes with the same command; the output appears under its
final name only when it is complete, and is the same bytes whether or not the run was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from weft.checkpoint.header import build_header
from weft.checkpoint.open import open_path
from weft.engine.chunks import ThreadWorkspaces, Workspace
from weft.engine.journal import WorkFolder, sync_folder
from weft.engine.merging import Merge
from weft.engine.plan import (
    COPY_BYTES,
    OutputTensor,
    Plan,
    default_memory,
    default_threads,
    index_file,
    staged,
    staging_allowance,
)
from weft.engine.progress import Progress
from weft.engine.writer import ShardWriter
from weft.errors import NonFiniteError, OutputError, RecipeError
from weft.kernels.convert import count_non_finite, from_float32, to_float32

COMMIT_BYTES = 128_000_000  # syncing each tensor by itself costs three times as much as syncing in groups
REPORT_FILE = "weft.json"


@dataclass
class Options:
    """How to run, which never changes what comes out.

    Attributes:
        threads: worker threads; default: the cores, at most 8.
        memory: budget for resident memory in bytes; default: the smaller of 512 MB and a quarter of the machine's.
        force: replace an output that weft made, and discard an interrupted run of another recipe.
        commit_bytes: how much is written between two syncs.
        progress: where to report.
        verify: called with the folder of finished files before the output gets its name; what it returns goes into the
            report, and what it raises keeps the output from being published.
    """

    threads: int = field(default_factory=default_threads)
    memory: int = field(default_factory=default_memory)
    force: bool = False
    commit_bytes: int = COMMIT_BYTES
    progress: Progress = field(default_factory=Progress)
    verify: Callable[[Path], Mapping[str, Any]] | None = None


@dataclass
class Result:
    """What a run did: the output's path, tensors written in this run and resumed from an earlier one, seconds, bytes."""

    output: Path
    tensors: int
    resumed: int
    seconds: float
    nbytes: int
    notes: list[str]


def execute(plan: Plan, output: str | os.PathLike[str], options: Options | None = None) -> Result:
    """Write the output that ``plan`` describes.

    Raises:
        OutputError: the output exists, is being written, belongs to another recipe, or does not fit on the disk.
        CheckpointError: an input turned out to be damaged; nothing is left behind.
    """
    options = options or Options()
    began = time.monotonic()
    target = Path(os.path.abspath(Path(output).expanduser()))
    if not plan.outputs:
        raise RecipeError("The recipe produces no tensors; nothing was written.")
    work = WorkFolder(target)
    if _published_before_a_kill(target, work, plan):
        return Result(target, 0, len(plan.outputs), time.monotonic() - began, plan.output_bytes, plan.notes)
    _check_target(target, plan, options.force)
    _check_space(target, work, plan)
    work.acquire()
    try:
        done, writers = _begin(work, plan, options.force)
        resumed = len(done)
        try:
            _compute(plan, work, writers, done, options)
            _finish(plan, work, writers, done)
            if options.verify is not None:
                _report(work, plan, done, options.verify(work.files))
        finally:
            for writer in writers.values():
                writer.close()
        work.publish(options.force, plan.single_file)
    except (KeyboardInterrupt, OutputError):
        if work.read()[1]:  # something is worth resuming
            work.release()
        else:
            work.remove()
        raise
    except BaseException:
        work.remove()
        raise
    finally:
        options.progress.finish()
    seconds = time.monotonic() - began
    return Result(target, len(plan.outputs) - resumed, resumed, seconds, plan.output_bytes, plan.notes)


def _published_before_a_kill(target: Path, work: WorkFolder, plan: Plan) -> bool:
    """Whether this very run had given the output its name and was killed before it could tidy up; tidies up."""
    if not (target.exists() and work.root.is_dir()) or (work.files.exists() and any(work.files.iterdir())):
        return False
    if work.read()[0] != _plain(plan.identity):
        return False
    work.acquire()
    work.remove()
    return True


def _check_target(target: Path, plan: Plan, force: bool) -> None:
    for name in plan.identity.get("paths", []):
        source = Path(name)
        if source == target or target in source.parents:
            raise OutputError(f"{target}: is, or contains, the input {source}. Choose another output.")
    if not (target.exists() or target.is_symlink()):
        return
    if not force:
        raise OutputError(f"{target}: exists already. Choose another output, or replace it with force=True.")
    replaceable = target.is_file() and target.suffix == ".safetensors" and plan.single_file
    if target.is_dir() and not plan.single_file:
        replaceable = (target / REPORT_FILE).is_file() or not any(target.iterdir())
    if not replaceable:
        raise OutputError(
            f"{target}: exists and was not made by weft, so force=True does not replace it. Remove it yourself."
        )


def _check_space(target: Path, work: WorkFolder, plan: Plan) -> None:
    if work.files.exists():
        return  # an interrupted run has reserved its space
    folder = next((p for p in target.parents if p.exists()), None)
    if folder is None:
        return
    free = shutil.disk_usage(folder).free
    if free < plan.output_bytes:
        raise OutputError(
            f"{target}: needs {plan.output_bytes:,} bytes, {folder} has {free:,} free. Free space or choose another output."
        )


def _begin(work: WorkFolder, plan: Plan, force: bool) -> tuple[dict[str, str], dict[str, ShardWriter]]:
    """Resume if the work folder holds this very run, refuse if it holds another, start otherwise."""
    by_name = {o.name: o for o in plan.outputs}
    writers = {}
    for shard, names in plan.shards.items():
        prefix, header = build_header(((n, by_name[n].dtype, by_name[n].shape) for n in names), plan.metadata)
        writers[shard] = ShardWriter(work.files / shard, prefix, header)
    identity, done = work.read()
    if identity is not None:
        if identity == _plain(plan.identity):
            if all(writer.reopen() for writer in writers.values()):
                work.begin(None)
                return {n: d for n, d in done.items() if n in by_name}, writers
        elif not force:
            changes = "\n".join(_differences(identity, _plain(plan.identity)))
            raise OutputError(
                f"{work.root}: holds an unfinished run of a different recipe or of inputs that have changed:\n{changes}\n"
                "Run the old recipe to finish it, or start over with force=True."
            )
    for writer in writers.values():
        writer.close()
    shutil.rmtree(work.files, ignore_errors=True)
    work.files.mkdir()
    try:
        for writer in writers.values():
            writer.create()
    except BaseException:
        for writer in writers.values():
            writer.close()
        raise
    work.begin(_plain(plan.identity))
    return {}, writers


def _compute(
    plan: Plan, work: WorkFolder, writers: dict[str, ShardWriter], done: dict[str, str], options: Options
) -> None:
    place = {name: writers[shard] for shard, names in plan.shards.items() for name in names}
    todo = sorted((o for o in plan.outputs if o.name not in done), key=lambda o: -o.input_bytes)
    allowance = staging_allowance(plan, options.threads, options.memory)
    stop = threading.Event()
    workspaces = ThreadWorkspaces()
    with ThreadPoolExecutor(options.threads, thread_name_prefix="weft") as pool:
        _prepare_stages(todo, workspaces, pool, options.progress)
        options.progress.start("writing", len(todo), sum(o.nbytes for o in todo))
        pending: dict[Future[str], OutputTensor] = {
            pool.submit(_write_one, o, place[o.name], workspaces, staged(o, allowance), stop): o for o in todo
        }
        ready: dict[str, str] = {}
        waiting = 0
        try:
            while pending:
                finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    one = pending.pop(future)
                    ready[one.name] = future.result()
                    waiting += one.nbytes
                    options.progress.advance(one.name, one.nbytes)
                if waiting >= options.commit_bytes or not pending:
                    _commit(ready, place, work, done)
                    ready, waiting = {}, 0
        except BaseException:
            stop.set()
            for future in pending:
                future.cancel()
            raise


def _prepare_stages(
    todo: list[OutputTensor], workspaces: ThreadWorkspaces, pool: ThreadPoolExecutor, progress: Progress
) -> None:
    """Find the states that need the whole model, with all threads, before any tensor is written."""
    seen: set[tuple[int, Any]] = set()
    for output in todo:
        merge = output.source
        if not isinstance(merge, Merge) or not merge.model_scope:
            continue
        key = (id(merge.stage), merge.stage.method.model_scope(merge.config))
        if key not in seen:
            seen.add(key)
            progress.start(f"measuring for {merge.stage.method.name}", len(merge.stage.merges), 1)
            merge.stage.state(merge.config, workspaces, pool)


def _write_one(
    output: OutputTensor,
    writer: ShardWriter,
    workspaces: Callable[[], Workspace],
    keep_in_memory: bool,
    stop: threading.Event,
) -> str:
    """Compute and write one tensor; the checksum of its bytes."""
    workspace = workspaces()
    offset = writer.header.tensors[output.name].offset
    digest = xxhash.xxh3_64()
    if isinstance(output.source, Merge):
        merge = output.source
        kept = merge.inputs.stage(workspace) if keep_in_memory else None
        merge.ready(workspace, kept)
        for number in range(len(merge.inputs.bounds)):
            if stop.is_set():
                break
            values = merge.compute(number, workspace, kept)
            offset = _put(values, output, writer, offset, digest, workspace, merge.inputs.allow_non_finite)
        return digest.hexdigest()
    tensor = output.source
    same = tensor.dtype is output.dtype
    width = 1 if same else tensor.dtype.bits // 8
    step = COPY_BYTES // 8 * 8
    for start in range(0, tensor.nbytes, step):
        if stop.is_set():
            break
        raw = workspace.array("copy", (min(step, tensor.nbytes - start),), np.uint8)
        tensor.read_into(raw.data, start)
        if same:
            digest.update(raw.data)
            writer.write(raw.data, offset)
            offset += raw.nbytes
        else:
            values = workspace.array("out", (raw.size // width,))
            to_float32(raw.view(tensor.dtype.numpy), tensor.dtype, values)
            offset = _put(values, output, writer, offset, digest, workspace, True)
    return digest.hexdigest()


def _put(
    values: np.ndarray,
    output: OutputTensor,
    writer: ShardWriter,
    offset: int,
    digest: Any,
    workspace: Workspace,
    allow_non_finite: bool,
) -> int:
    """Round, write and hash one chunk; the offset of the next."""
    bits = from_float32(values, output.dtype, workspace.array("rounded", values.shape, output.dtype.numpy))
    if not allow_non_finite:
        bad = count_non_finite(values.view(np.uint32))
        if not bad and output.dtype.name == "F16":
            bad = int(np.count_nonzero(np.isinf(bits)))
        if bad:
            raise NonFiniteError(
                f"{output.name}: the result holds {bad} values that {output.dtype.name} cannot represent "
                "(NaN or infinity). Check weights and scales, choose a wider dtype, or pass allow_non_finite=True."
            )
    raw = bits.view(np.uint8)
    digest.update(raw.data)
    writer.write(raw.data, offset)
    return offset + raw.nbytes


def _commit(ready: dict[str, str], place: dict[str, ShardWriter], work: WorkFolder, done: dict[str, str]) -> None:
    for writer in {id(place[name]): place[name] for name in ready}.values():
        writer.sync()
    work.record(ready)
    done.update(ready)


def _finish(plan: Plan, work: WorkFolder, writers: dict[str, ShardWriter], checksums: dict[str, str]) -> None:
    """Companion files, the report, and a last look through our own reader."""
    for name, content in plan.files.items():
        (work.files / name).write_bytes(content)
    for name, source in plan.copies.items():
        shutil.copyfile(source, work.files / name)
    if not plan.single_file:
        if len(plan.shards) > 1:
            index = index_file(plan.shards, plan.output_bytes)
            (work.files / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        _report(work, plan, checksums, {})
    for path in work.files.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for writer in writers.values():
        with open_path(writer.path) as written:
            if {n: t.info for n, t in written.tensors.items()} != dict(writer.header.tensors):
                raise OutputError(f"{writer.path}: does not read back as it was written; the disk or memory is faulty.")
    sync_folder(work.files)


def _report(work: WorkFolder, plan: Plan, checksums: dict[str, str], more: Mapping[str, Any]) -> None:
    if plan.single_file:
        return
    report = {**plan.report, **more, "checksums": {o.name: checksums[o.name] for o in plan.outputs}}
    with (work.files / REPORT_FILE).open("w", encoding="utf-8") as file:
        file.write(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    """As it will be read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines that show where two nested values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            lines += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new)) for line in _differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [f"  {path}: was {old!r}, is {new!r}"]
