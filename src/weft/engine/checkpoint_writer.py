"""A changed copy of a checkpoint, written tensor by tensor as they are made: same names, shapes and types.

Tensors that are computed when they are read (adapted, dequantised) are written in the type that they would have in a file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.header import build_header
from weft.checkpoint.open import open_path
from weft.engine.journal import WorkFolder, sync_folder
from weft.engine.plan import COPY_BYTES, index_file, split_into_shards
from weft.engine.run import REPORT_FILE
from weft.engine.writer import ShardWriter
from weft.errors import OutputError, disk_error
from weft.kernels.convert import from_float32

SHARD_BYTES = 5_000_000_000
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_NOT_COPIED = ("*.index.json", REPORT_FILE, "report.json", "adapter_config.json")


class CheckpointWriter:
    """Writes tensors at their places; what was not written when it is published is copied from the checkpoint.

    Use it in a ``with`` statement. Memory: one tensor. The folder appears complete or not at all.

    Args:
        checkpoint: gives names, shapes, types, companion files (configuration, tokenizer), and what does not change.
        output: the folder.
        force: replace an output that weft made.
        shard_bytes: largest file.
        work: a work folder whose lock is held already, and which is kept if nothing is published.

    Raises:
        OutputError: the output exists (and was not made by weft, or without ``force``), holds the checkpoint, is being
            written, or does not fit on the disk; nothing is left behind.

    >>> import tempfile, weft
    >>> with weft.open({"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}) as checkpoint:
    ...     with CheckpointWriter(checkpoint, f"{tempfile.mkdtemp()}/out") as writer:
    ...         writer.write("a", np.full(2, 3, np.float32))
    ...         writer.publish({})
    >>> with weft.open(writer.output) as made:
    ...     {name: tensor.numpy().tolist() for name, tensor in made.items()}
    {'a': [3.0, 3.0], 'b': [1.0, 1.0]}
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        output: str | os.PathLike[str],
        *,
        force: bool = False,
        shard_bytes: int = SHARD_BYTES,
        work: WorkFolder | None = None,
    ):
        self.output = Path(os.path.abspath(Path(output).expanduser()))
        self.written: dict[str, str] = {}
        self._checkpoint = checkpoint
        self._force = force
        self._work = work or WorkFolder(self.output)
        self._owns_work = work is None
        self._shards = split_into_shards({n: _nbytes(t) for n, t in checkpoint.items()}, shard_bytes)
        self._writers: dict[str, ShardWriter] = {}
        self._published = False

    def __enter__(self) -> CheckpointWriter:
        check_target(self._checkpoint, self.output, self._force)
        if self._owns_work:
            self._work.acquire()
        try:
            shutil.rmtree(self._work.files, ignore_errors=True)
            try:
                self._work.files.mkdir()
            except OSError as error:
                raise disk_error(self._work.files, error) from None
            for shard, names in self._shards.items():
                infos = ((n, self._checkpoint[n].natural_dtype, self._checkpoint[n].shape) for n in names)
                prefix, header = build_header(infos, {})
                writer = ShardWriter(self._work.files / shard, prefix, header)
                self._writers |= dict.fromkeys(names, writer)
                writer.create()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for writer in {id(w): w for w in self._writers.values()}.values():
            writer.close()
        if not self._published and self._owns_work:
            self._work.remove()

    def write(self, name: str, bits: np.ndarray) -> None:
        """Write one tensor, given as the bits of its elements in the checkpoint's (natural) type.

        Raises:
            OutputError: it has another size than in the checkpoint.
        """
        data = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
        info = self._writers[name].header.tensors[name]
        if data.nbytes != info.nbytes:
            raise OutputError(
                f"{name}: has {data.nbytes:,} bytes and not the {info.nbytes:,} that the checkpoint's has."
            )
        self._writers[name].write(data.data, info.offset)
        self.written[name] = xxhash.xxh3_64_hexdigest(data.data)

    def publish(self, report: Mapping[str, Any], files: Mapping[str, str] | None = None) -> None:
        """Copy the rest, write ``weft.json``, look at everything once more, and give the folder its name.

        Args:
            report: what ``weft.json`` says, beside what changed (if it does not say that itself) and the checksums.
            files: texts of further files by name; they take the place of copied ones.
        """
        changed = sorted(self.written)
        for name in self._checkpoint:
            if name not in self.written:
                self._copy(name)
        checksums = {name: self.written[name] for name in self._checkpoint}
        self._write_files({"changed": changed, **report, "checksums": checksums}, files or {})
        for writer in {id(w): w for w in self._writers.values()}.values():
            writer.sync()
            with open_path(writer.path) as made:
                if {n: t.info for n, t in made.tensors.items()} != dict(writer.header.tensors):
                    raise OutputError(f"{writer.path}: does not read back as it was written; the disk is faulty.")
        sync_folder(self._work.files)
        self._work.publish(self._force, single_file=False)
        self._published = True

    def _copy(self, name: str) -> None:
        tensor, digest = self._checkpoint[name], xxhash.xxh3_64()
        writer = self._writers[name]
        offset = writer.header.tensors[name].offset
        buffer = np.empty(min(COPY_BYTES, tensor.nbytes), np.uint8)
        for start in range(0, tensor.nbytes, COPY_BYTES):
            part = buffer[: min(COPY_BYTES, tensor.nbytes - start)]
            tensor.read_into(part.data, start)
            raw = part
            if tensor.natural_dtype is not tensor.dtype:
                raw = from_float32(part.view(np.float32), tensor.natural_dtype).view(np.uint8)
            digest.update(raw.data)
            writer.write(raw.data, offset)
            offset += raw.nbytes
        self.written[name] = digest.hexdigest()

    def _write_files(self, report: Mapping[str, Any], files: Mapping[str, str]) -> None:
        folder = self._work.files
        try:
            for source in sorted(self._checkpoint.folder.iterdir()) if self._checkpoint.folder else ():
                wanted = any(fnmatch(source.name, p) for p in _COMPANIONS)
                if wanted and not any(fnmatch(source.name, p) for p in _NOT_COPIED) and source.is_file():
                    shutil.copyfile(source, folder / source.name)
            if self._checkpoint.packed:  # what is written is dense, and the model's own files say otherwise
                (folder / "config.json").write_text(json.dumps(self._checkpoint.config, indent=2) + "\n")
                (folder / "quantize_config.json").unlink(missing_ok=True)
            if len(self._shards) > 1:
                index = index_file(self._shards, sum(map(_nbytes, self._checkpoint.values())))
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
            (folder / REPORT_FILE).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")
            for path in [*folder.glob("*.json"), *(folder / name for name in files)]:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise disk_error(self.output, error) from None


def check_target(checkpoint: Checkpoint, output: Path, force: bool) -> None:
    """Whether an output may be written: an absolute path.

    Raises:
        OutputError: it holds the checkpoint that is read, or exists and may not be replaced.
    """
    source = checkpoint.folder
    if source is not None and (source.resolve() == output or output in source.resolve().parents):
        raise OutputError(f"{output}: is, or contains, the model that is read. Choose another output.")
    if not (output.exists() or output.is_symlink()):
        return
    if not force:
        raise OutputError(f"{output}: exists already. Choose another output, or replace it with force=True.")
    if not (output.is_dir() and ((output / REPORT_FILE).is_file() or not any(output.iterdir()))):
        raise OutputError(f"{output}: exists and was not made by weft, so it is not replaced. Remove it yourself.")


def _nbytes(tensor: LazyTensor) -> int:
    return tensor.natural_dtype.nbytes(tensor.size)
