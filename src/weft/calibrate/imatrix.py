"""llama.cpp's importance matrices: how large the inputs of each weight are on data, read, written, and as statistics.

For each weight W (out, in) a file holds Σ x² of each input channel over all tokens and how many tokens there were. There are
two forms. In GGUF (``general.type`` is ``imatrix``) the tensors ``NAME.in_sum2`` (experts, in) and ``NAME.counts``
(experts, 1); in the older ``.dat`` the means of chunks, little-endian::

    i32 entries, of each: i32 length, name, i32 calls, i32 values, f32 × values = calls · Σ x² / tokens
    i32 chunks, i32 length, name of the data            (not in the oldest files)

Names are GGUF's names of the weights (``blk.0.attn_q.weight``).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from weft.calibrate.facts import Facts
from weft.calibrate.statistics import Statistics
from weft.checkpoint.files import LocalFile, read_bytes
from weft.checkpoint.gguf import open_gguf
from weft.checkpoint.gguf_blocks import ggml_type
from weft.checkpoint.gguf_header import MAGIC, build_gguf_header, value_bytes
from weft.checkpoint.gguf_names import ARCHITECTURES, Architecture
from weft.errors import CheckpointError, OutputError, RecipeError, did_you_mean

CHUNK = 512  # tokens of a chunk, llama.cpp's default
_MAX_BYTES = 8_000_000_000  # an importance matrix of a model of trillions of weights is below it
_MAX_NAME = 1 << 12


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    Attributes:
        square_sum: for each weight Σ x² of its inputs, (experts, in) float32; one expert where the weight is a matrix.
        counts: for each weight the tokens counted, (experts,) int64. Of a ``.dat`` file the calls, which stand for them.
        datasets: what it was made from.
        chunk_size: tokens of a chunk.
    """

    square_sum: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    datasets: tuple[str, ...] = ()
    chunk_size: int = CHUNK

    def mean_squares(self) -> dict[str, np.ndarray]:
        """The mean of x² for each input of each matrix, (in,), as :func:`weft.engine.gguf.write_gguf` takes them.

        A matrix that saw no token counts all inputs alike. Weights of several experts are left out.

        >>> made = Imatrix({"output.weight": np.float32([[2, 8]])}, {"output.weight": np.array([2])})
        >>> made.mean_squares()["output.weight"].tolist()
        [1.0, 4.0]
        """
        found = {}
        for name, squares in self.square_sum.items():
            if len(squares) == 1:
                count = int(self.counts[name][0])
                found[name] = (squares[0] / np.float32(count)) if count else np.ones_like(squares[0])
        return found


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an importance matrix of either form.

    Raises:
        CheckpointError: the file is damaged, or holds something else.
    """
    place = Path(path)
    file = LocalFile(place)
    try:
        if file.size > _MAX_BYTES:
            raise CheckpointError(f"{place}: larger than {_MAX_BYTES:,} bytes, which no importance matrix is.")
        newer = read_bytes(file, 0, min(4, file.size)) == MAGIC
        found = _read_gguf(place) if newer else _read_legacy(file, str(place))
    finally:
        file.close()
    for name, squares in found.square_sum.items():
        if not np.isfinite(squares).all() or (squares < 0).any():
            raise CheckpointError(
                f"{place}: {name} has sums of squares that are negative or not finite. Make it again."
            )
    return found


def write_imatrix(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Write an importance matrix: the older form if the name ends in ``.dat``, else GGUF. It appears complete or not at all.

    Raises:
        OutputError: the file exists, or cannot be written.

    >>> import tempfile
    >>> made = Imatrix({"output.weight": np.float32([[2, 8]])}, {"output.weight": np.array([2])}, ("texts",), 2)
    >>> for name in ("made.gguf", "made.dat"):
    ...     path = f"{tempfile.mkdtemp()}/{name}"
    ...     write_imatrix(path, made)
    ...     read_imatrix(path).mean_squares()["output.weight"].tolist()
    [1.0, 4.0]
    [1.0, 4.0]
    """
    target = Path(path)
    if target.exists():
        raise OutputError(f"{target}: exists already. Choose another name, or remove it first.")
    data = _legacy_bytes(imatrix) if target.suffix == ".dat" else _gguf_bytes(imatrix)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}).") from None
    finally:
        partial.unlink(missing_ok=True)


def imatrix_from_statistics(
    statistics: Statistics, architecture: str = "llama", datasets: tuple[str, ...] = ()
) -> Imatrix:
    """The importance matrix of gathered statistics.

    Args:
        statistics: with ``scales`` gathered (Σ x² of each input).
        architecture: GGUF's, whose names the weights get.
        datasets: to note in the file.

    Returns:
        Sums and counts of all layers that the architecture names and that saw a token.

    Raises:
        RecipeError: there is no such architecture, or it names none of the layers, or the sums were not gathered.

    >>> import weft.calibrate
    >>> model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(2, 3, bias=False)})
    >>> model.forward = lambda x: model["lm_head"](x)
    >>> found = weft.calibrate.collect(model, [torch.tensor([[1.0, 2.0]])], "scales")
    >>> imatrix_from_statistics(found).square_sum["output.weight"].tolist()
    [[1.0, 4.0]]
    """
    row = _row(architecture)
    squares, counts = {}, {}
    for layer in statistics.layers:
        name = row.to_gguf(f"{layer}.weight")
        if name is not None and statistics.rows(layer):
            squares[name] = statistics.square_sum(layer).float().cpu().numpy()[None]
            counts[name] = np.array([statistics.rows(layer)], np.int64)
    if not squares:
        first = next(iter(statistics.layers), "none")
        raise RecipeError(
            f"GGUF's {architecture} names none of the layers, such as {first}. Name another architecture."
        )
    return Imatrix(squares, counts, datasets)


def statistics_from_imatrix(imatrix: Imatrix, architecture: str = "llama") -> Statistics:
    """An importance matrix as statistics of a transformers model, from which Wanda and others take ``norm``.

    Args:
        imatrix: read from a file.
        architecture: GGUF's, by whose names the weights are found. Weights of several experts are left out.

    Returns:
        Statistics of layers with the one statistic that the file has. They hold no fingerprints of weights.

    Raises:
        RecipeError: there is no such architecture, or it has none of the names.

    >>> made = Imatrix({"blk.0.attn_q.weight": np.float32([[4, 9]])}, {"blk.0.attn_q.weight": np.array([5])})
    >>> statistics_from_imatrix(made).norm("model.layers.0.self_attn.q_proj").tolist()
    [2.0, 3.0]
    """
    row = _row(architecture)
    tensors, facts = {}, Facts(provenance={"imatrix": list(imatrix.datasets)})
    for name, squares in imatrix.square_sum.items():
        theirs = row.to_hugging_face(name)
        if theirs is not None and len(squares) == 1:
            layer = theirs.removesuffix(".weight")
            tensors[f"{layer}/square_sum"] = torch.from_numpy(squares[0].copy())
            facts.layers[layer] = (layer, int(imatrix.counts[name][0]))
    if not tensors:
        raise RecipeError(
            f"GGUF's {architecture} has none of the names, such as {next(iter(imatrix.square_sum), 'none')}."
        )
    return Statistics(tensors, facts)


def _row(architecture: str) -> Architecture:
    if architecture not in ARCHITECTURES:
        raise RecipeError(f"There are no names for {architecture!r}.{did_you_mean(architecture, ARCHITECTURES)}")
    return ARCHITECTURES[architecture]


def _read_gguf(path: Path) -> Imatrix:
    with closing(open_gguf(path, "file")) as opened:
        header = opened.header
        assert header is not None
        if header.get("general.type") != "imatrix":
            raise CheckpointError(f"{path}: is a GGUF file but no importance matrix (general.type is not imatrix).")
        squares, counts = {}, {}
        for key, tensor in opened.items():
            name, _, kind = key.rpartition(".")
            if kind == "in_sum2":
                beside = opened.tensors.get(f"{name}.counts")
                one = len(tensor.shape) == 1
                experts = 1 if one else tensor.shape[0]
                form = tensor.dtype.name == "F32" and len(tensor.shape) in (1, 2) and experts > 0
                if not form or beside is None or beside.dtype.name != "F32" or beside.size != experts:
                    raise CheckpointError(
                        f"{path}: {name} needs in_sum2 (experts, in) and counts (experts, 1) of F32. Make it again."
                    )
                squares[name] = tensor.numpy().reshape(experts, -1)
                seen = beside.numpy().reshape(-1)
                if not np.isfinite(seen).all() or (seen < 0).any() or (seen > 2**62).any():
                    raise CheckpointError(f"{path}: {name} has counts that are none. Make it again.")
                counts[name] = np.rint(seen).astype(np.int64)
        if not squares:
            raise CheckpointError(f"{path}: holds no importance of any weight.")
        datasets, chunk = header.get("imatrix.datasets", []), header.get("imatrix.chunk_size", CHUNK)
        good = isinstance(datasets, list) and type(chunk) is int and chunk > 0
        return Imatrix(squares, counts, tuple(map(str, datasets)) if good else (), chunk if good else CHUNK)


def _read_legacy(file: LocalFile, where: str) -> Imatrix:
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or count > file.size - at:
            raise CheckpointError(
                f"{where}: {count:,} bytes expected from byte {at:,} on, the file has {file.size:,}. It is no importance "
                "matrix, or truncated."
            )
        at += count
        return read_bytes(file, at - count, count)

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries = number()
    if not 0 < entries <= file.size // 12:
        raise CheckpointError(
            f"{where}: {entries:,} entries cannot be in {file.size:,} bytes; it is no importance matrix."
        )
    squares: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for _ in range(entries):
        length = number()
        if not 0 < length <= _MAX_NAME:
            raise CheckpointError(f"{where}: a name of {length:,} bytes; it is no importance matrix, or damaged.")
        name = take(length).decode("utf-8", "replace")
        calls, values = number(), number()
        if name in squares or calls < 0 or values < 1:
            raise CheckpointError(
                f"{where}: {name!r} stands twice, or has {calls} calls and {values} values. It is damaged."
            )
        squares[name] = np.frombuffer(take(4 * values), "<f4").astype(np.float32)[None]
        counts[name] = np.array([calls], np.int64)
    datasets: tuple[str, ...] = ()
    if file.size - at >= 8:
        number()
        datasets = (take(number()).decode("utf-8", "replace"),)
    return Imatrix(squares, counts, datasets, 1)


def _gguf_bytes(imatrix: Imatrix) -> bytes:
    most = max((int(c.max()) for c in imatrix.counts.values()), default=0)
    entries = {
        "general.type": value_bytes("string", "imatrix"),
        "imatrix.datasets": value_bytes("string[]", list(imatrix.datasets)),
        "imatrix.chunk_count": value_bytes("uint32", -(-most // imatrix.chunk_size)),
        "imatrix.chunk_size": value_bytes("uint32", imatrix.chunk_size),
    }
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(imatrix.square_sum):
        arrays[f"{name}.in_sum2"] = np.ascontiguousarray(imatrix.square_sum[name], "<f4")
        arrays[f"{name}.counts"] = imatrix.counts[name].astype("<f4")[:, None]
    prefix, place, size = build_gguf_header(entries, ((n, ggml_type("F32"), a.shape) for n, a in arrays.items()))
    made = bytearray(size)
    made[: len(prefix)] = prefix
    for name, array in arrays.items():
        made[place[name].offset : place[name].offset + array.nbytes] = array.tobytes()
    return bytes(made)


def _legacy_bytes(imatrix: Imatrix) -> bytes:
    kept = [n for n in sorted(imatrix.square_sum) if imatrix.counts[n].any()]
    parts = [struct.pack("<i", len(kept))]
    most = 0
    for name in kept:
        count = imatrix.counts[name][:, None]
        calls = -(-int(count.max()) // imatrix.chunk_size)
        most = max(most, calls)
        means = np.where(count > 0, imatrix.square_sum[name] / np.maximum(count, 1).astype(np.float32), np.float32(1))
        values = (means * np.float32(calls)).astype("<f4").reshape(-1)
        text = name.encode()
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", calls, values.size), values.tobytes()]
    text = (imatrix.datasets[-1] if imatrix.datasets else "").encode()
    return b"".join([*parts, struct.pack("<ii", most, len(text)), text])
