"""Evidence about a quantised model on disk: what each layer lost, in numbers.

    write_report("quantised/", before="model/", seconds=81.2, scores={"before": …, "after": …})
    compare_reports("quantised/", "other/")["layers"][0]       # the layer whose error differs most

``report.json`` is made from the folder's ``weft.json``, the headers of its files, and what the caller knows beside: times, peak
memory and scores, which are in no other file of the folder, since the same run must give the same bytes.
:func:`weft.view.evidence.report_page` shows it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.folder import read_json
from weft.checkpoint.open import open_checkpoint, open_path
from weft.engine.run import REPORT_FILE
from weft.errors import CheckpointError, OutputError

JSON_FILE = "report.json"
VERSION = 1
_BLOCK = re.compile(r"(.*?\.\d+)\..*|(\d+)\..*")
_NUMBERS = ("output_error", "error", "outlier", "loss", "bits", "few_rows")


def write_report(
    folder: str | os.PathLike[str],
    *,
    before: str | os.PathLike[str] | Checkpoint | int | None = None,
    seconds: float | None = None,
    layer_seconds: Mapping[str, float] | None = None,
    peak_memory: int | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    output: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Write ``report.json`` of a quantised model; one that is there is replaced.

    Args:
        folder: what :func:`weft.quantize.quantize_model` wrote.
        before: the original model, or the bytes of its tensors.
        seconds: of the run.
        layer_seconds: of single layers.
        peak_memory: bytes.
        scores: by a name for each model, such as ``before`` and ``after``, what :func:`weft.quantize.evaluate` returns.
        output: where to write, instead of into the folder.

    Returns:
        What ``report.json`` holds; layers are sorted by their errors, the worst first.

    Raises:
        CheckpointError: the folder has no report of layers, or cannot be read.
        OutputError: the file cannot be written.
    """
    root = Path(folder)
    report = make_report(
        root, before=before, seconds=seconds, layer_seconds=layer_seconds, peak_memory=peak_memory, scores=scores
    )
    target = root if output is None else Path(output)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        target.mkdir(parents=True, exist_ok=True)
        partial = target / f".{JSON_FILE}.{os.getpid()}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target / JSON_FILE)
    except OSError as error:
        raise OutputError(f"{target}: the report cannot be written ({error.strerror}).") from None
    return report


def make_report(
    folder: str | os.PathLike[str],
    *,
    before: str | os.PathLike[str] | Checkpoint | int | None = None,
    seconds: float | None = None,
    layer_seconds: Mapping[str, float] | None = None,
    peak_memory: int | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The report as a JSON value, written nowhere; see :func:`write_report`."""
    root = Path(folder)
    known = _facts_of(root)
    layers: Mapping[str, Any] = known["layers"]
    times = dict(layer_seconds or {})
    measure = "output_error" if any("output_error" in notes for notes in layers.values()) else "error"
    rows = [_row(name, notes, times.get(name)) for name, notes in layers.items()]
    rows.sort(key=lambda row: (-(row[measure] if row[measure] is not None else -1.0), row["layer"]))
    with closing(open_checkpoint(root)) as checkpoint:
        sizes = sizes_of(checkpoint)
    return {
        "format": "weft quantisation report",
        "version": VERSION,
        "model": str(known.get("model", root.name)),
        "weft": str(known.get("weft", "")),
        "recipe": known.get("recipe", {}),
        "measure": measure,
        "summary": {
            "layers": len(layers),
            **sizes,
            "bytes_before": _bytes_before(before),
            "seconds": seconds,
            "peak_memory": peak_memory,
        },
        "scores": {name: {k: _number(v) for k, v in one.items()} for name, one in (scores or {}).items()},
        "notes": {
            "few_rows": [r["layer"] for r in rows if r["few_rows"] is not None],
            "failed": [{"layer": r["layer"], "reason": layers[r["layer"]]["failed"]} for r in rows if "failed" in layers[r["layer"]]],
            "dense": [r["layer"] for r in rows if "dense" in layers[r["layer"]]],
        },
        "blocks": _blocks(list(layers), rows, measure, known.get("blocks")),
        "layers": rows,
    }  # fmt: skip


def compare_reports(
    a: Mapping[str, Any] | str | os.PathLike[str], b: Mapping[str, Any] | str | os.PathLike[str]
) -> dict[str, Any]:
    """What two reports say of the same layers.

    Args:
        a, b: reports, their files, or folders that hold them.

    Returns:
        ``summary``: each number of both with their difference; ``scores`` likewise, of those that both have; ``layers``: the
        measure of both and the ratio b / a (None where a is 0), the layer that got worse by the largest factor first;
        ``only_a`` and ``only_b``: other layers.

    Raises:
        CheckpointError: one is no report.
    """
    first, second = _read(a), _read(b)
    measure = first["measure"] if first["measure"] == second["measure"] else "error"
    mine, theirs = ({row["layer"]: row.get(measure) for row in one["layers"]} for one in (first, second))
    rows = []
    for name in mine.keys() & theirs.keys():
        x, y = mine[name], theirs[name]
        ratio = y / x if x and y is not None else None
        rows.append({"layer": name, "a": x, "b": y, "ratio": ratio})
    rows.sort(key=lambda row: (-(row["ratio"] if row["ratio"] is not None else -1.0), row["layer"]))
    return {
        "names": [first["model"], second["model"]],
        "measure": measure,
        "summary": _differences(first["summary"], second["summary"]),
        "scores": {
            name: _differences(first["scores"][name], second["scores"][name])
            for name in first["scores"] if name in second["scores"]
        },
        "layers": rows,
        "only_a": sorted(mine.keys() - theirs.keys()),
        "only_b": sorted(theirs.keys() - mine.keys()),
    }  # fmt: skip


def _facts_of(root: Path) -> dict[str, Any]:
    if not (root / REPORT_FILE).is_file():
        raise CheckpointError(f"{root}: holds no {REPORT_FILE}; give a folder that weft quantised a model into.")
    known = read_json(root / REPORT_FILE)
    layers = known.get("layers")
    if not isinstance(layers, Mapping) or not layers or not all(isinstance(v, Mapping) for v in layers.values()):
        raise CheckpointError(f"{root / REPORT_FILE}: says nothing of layers; it is of a model that was not quantised.")
    return known


def _row(name: str, notes: Mapping[str, Any], seconds: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": name, "block": _block_of(name), "form": str(notes.get("form", "–"))}
    row |= {key: _number(notes.get(key)) for key in _NUMBERS}
    said = []
    if row["few_rows"] is not None:
        said.append(f"{row['few_rows']:.0f} rows")
    if "failed" in notes:
        said.append(f"failed: {notes['failed']}")
    if "dense" in notes:
        said.append(f"dense: {notes['dense']}")
    extra = notes.get("notes")
    said += [str(n) for n in extra] if isinstance(extra, list) else []
    return {**row, "seconds": seconds, "note": "; ".join(said)}


def _block_of(name: str) -> str:
    """The name up to its first number; empty outside of blocks."""
    found = _BLOCK.fullmatch(name)
    return (found[1] or found[2]) if found else ""


def _blocks(order: list[str], rows: list[dict[str, Any]], measure: str, facts: Any) -> list[dict[str, Any]]:
    """Mean and largest error of each block, in the order of the model, and what its change noted."""
    known = facts if isinstance(facts, Mapping) else {}
    values: dict[str, list[float]] = {_block_of(name): [] for name in order}
    for row in rows:
        if row[measure] is not None:
            values[row["block"]].append(row[measure])
    return [
        {
            "block": block,
            "mean": math.fsum(v) / len(v) if v else None,
            "largest": max(v, default=None),
            "facts": known.get(block),
        }
        for block, v in values.items()
    ]


def sizes_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a model takes on disk, from headers alone.

    Returns:
        ``bytes`` of all tensors in its files, ``bits_per_weight`` of its packed layers with everything that belongs to them
        (None where there are none, or where files are of another kind than safetensors), ``bits_per_parameter`` of all.
    """
    plain = {name: tensor for name, tensor in checkpoint.items() if name not in checkpoint.aliases}
    held: dict[str, LazyTensor] = {}
    total = sum(tensor.nbytes for tensor in plain.values())
    if checkpoint.packed and checkpoint.folder is not None:
        for path in sorted(checkpoint.folder.glob("*.safetensors")):
            with open_path(path) as file:
                held |= file.tensors
        total = sum(t.nbytes for t in held.values()) or sum(p.stat().st_size for p in checkpoint.folder.glob("*.gguf"))
    same = {n for n, t in plain.items() if n in held and held[n].shape == t.shape}
    weights = sum(t.size for n, t in plain.items() if n not in same)
    packed = sum(t.nbytes for n, t in held.items() if n not in same)
    return {
        "bytes": total,
        "bits_per_weight": 8 * packed / weights if held and weights else None,
        "bits_per_parameter": 8 * total / max(checkpoint.parameters, 1),
    }


def _bytes_before(before: Any) -> int | None:
    if before is None or isinstance(before, int):
        return before
    checkpoint = open_checkpoint(before)
    try:
        return int(sizes_of(checkpoint)["bytes"])
    finally:
        if checkpoint is not before:
            checkpoint.close()


def _read(report: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    value: Any = report
    where = "The report"
    if not isinstance(report, Mapping):
        path = Path(report) / JSON_FILE if Path(report).is_dir() else Path(report)
        value, where = read_json(path), str(path)
    good = value.get("format") == "weft quantisation report" and value.get("version") == VERSION
    parts = ("layers", list), ("summary", dict), ("scores", dict), ("measure", str)
    if not good or not all(isinstance(value.get(key), kind) for key, kind in parts):
        raise CheckpointError(f"{where}: is no report of version {VERSION} of a quantised model; write it again.")
    if not all(isinstance(row, Mapping) and "layer" in row for row in value["layers"]):
        raise CheckpointError(f"{where}: its layers have no names; write it again.")
    return value


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for key in a:
        x, y = _number(a[key]), _number(b.get(key))
        if x is not None or y is not None:
            found[key] = {"a": x, "b": y, "difference": y - x if x is not None and y is not None else None}
    return found


def _number(value: Any) -> float | None:
    """A finite number, or None: JSON has no others."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
