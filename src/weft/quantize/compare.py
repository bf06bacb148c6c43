"""Compare candidates for quantising a model: one pass over calibration data for all, then each one's size and score.

The original model is walked once (once more where ``mixed`` is asked for); its statistics give every candidate's error in every layer
(:mod:`weft.quantize.measure_curves`), and the candidates themselves, each of which is written, scored on held-out data
(:func:`weft.quantize.evaluate`) and removed again. ``mixed`` candidates have the bits of each layer chosen from the same
errors.

Candidates are fitted to the inputs that the *original* model gives, so that they share one pass. With ``sequential`` each
has a walk of its own, in which a block sees what the quantised blocks before it give, as :func:`weft.quantize.quantize_model`
does by itself: slower, and mostly a little better.

What counts is one number, the ``loss``: of causal language models the KL divergence from the original, of encoders 1 − cos
of mean embeddings, of others the relative output error. :func:`weft.view.evidence.comparison_page` shows a comparison.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import weft
from weft.calibrate import Change, Statistics, collect
from weft.calibrate.collectors import KINDS
from weft.calibrate.describe import describe
from weft.calibrate.facts import FILE as STATISTICS_FILE
from weft.calibrate.forward import digest_of, on_cpu
from weft.calibrate.parts import Part, Parts
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.folder import read_json
from weft.checkpoint.open import open_checkpoint
from weft.engine.journal import WorkFolder
from weft.engine.progress import Progress
from weft.errors import (
    CheckpointError,
    MissingDependencyError,
    OutputError,
    RecipeError,
    WeftError,
    disk_errors,
)
from weft.quantize.choose import Chosen, choose_bits
from weft.quantize.curves import INPUTS, Curves
from weft.quantize.evaluate import evaluate
from weft.quantize.measure_curves import FAILURES, error_curves
from weft.quantize.report import sizes_of
from weft.quantize.run import AUTO, quantize_model

LOSSES = {
    "kl": 0.05,
    "cosine_distance": 0.02,
    "output_error": 0.1,
}  # the first that a model has counts; what is small enough
JSON_FILE, CURVES_FILE = "comparison.json", "curves.json"


def compare_methods(
    model: Checkpoint | str | Path,
    candidates: Mapping[str, Change],
    batches: Iterable[Any],
    held_out: Iterable[Any],
    output: str | os.PathLike[str],
    *,
    mixed: Sequence[float] = (),
    measure: str = "",
    together: str | Sequence[Sequence[str]] = INPUTS,
    tolerance: float | None = None,
    budget: int | None = None,
    sequential: bool = False,
    keep: bool = False,
    memory: int = 1 << 30,
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantise a model in several ways, score each, and say which to take.

    A run that is killed is begun again with the same call and goes on where it was. Disk: the statistics (a float32 matrix
    n × n for each distinct input of n channels) and one quantised model at a time.

    Args:
        model: a folder, Hub id or open checkpoint of a transformers model.
        candidates: configurations by label.
        batches: calibration data.
        held_out: data to score on, that no candidate was fitted to.
        output: a folder: ``comparison.json``, ``curves.json``, with ``keep`` also ``models/``.
        mixed: further candidates: bits per weight of models whose layers each have one of the ``candidates``.
        measure, together: how these are chosen; see :func:`weft.quantize.choose_bits`.
        tolerance: the loss that is small enough; None: what ``LOSSES`` says of the kind.
        budget: bytes of the model's tensors; then the best candidate is the one with the least loss among those that fit,
            instead of the smallest one within the tolerance.
        sequential: a calibration for each candidate; see the module.
        keep: keep the quantised models.
        memory, check: see :class:`weft.calibrate.Walk`.
        force: replace an output that holds a comparison; discard an unfinished run of another comparison.
        progress: where to report.

    Returns:
        What ``comparison.json`` holds: ``rows`` (a candidate's ``bytes``, ``loss``, ``scores``, ``seconds``, whether no other
        one beats it in size and loss (``pareto``), and why it ``failed``), the ``best``, a ``verdict`` in words, each layer's
        errors, and the ``frontier``: the least error of mixed candidates by bits per weight.

    Raises:
        RecipeError: there is nothing to compare, or no data.
        CheckpointError: the model cannot be read, walked or scored.
        OutputError: the output exists or cannot be written.
    """
    if not candidates:
        raise RecipeError("There is nothing to compare; give candidates by label.")
    data, held = [on_cpu(b) for b in batches], [on_cpu(b) for b in held_out]
    if not data or not held:
        raise RecipeError(
            f"A comparison needs data to calibrate on and other data to score on, got {len(data)} and {len(held)} batches."
        )
    labels = [*candidates, *(f"mixed {bits:g}" for bits in mixed)]
    if len({_file_name(label) for label in ["original", *labels]}) <= len(labels):
        raise RecipeError(
            f"Candidates need names that differ in letters or digits, and none is called original; got {', '.join(labels)}."
        )
    target = Path(os.path.abspath(Path(output).expanduser()))
    work = WorkFolder(target)
    checkpoint = open_checkpoint(model)
    with closing(checkpoint) if checkpoint is not model else nullcontext():
        known = {
            "model": checkpoint.name,
            "candidates": {label: describe(c) for label, c in candidates.items()},
            "mixed": list(mixed),
            "measure": measure,
            "sequential": sequential,
            "data": digest_of(data),
            "held_out_data": digest_of(held),
        }
        texts = [
            weft.__version__,
            checkpoint.fingerprint,
            json.dumps(known, sort_keys=True, default=str),
            repr(together),
        ]
        work.identity = digest_of(texts)
        if work.tidy() == work.identity:  # this very run was killed when all was done
            return dict(read_json(target / JSON_FILE))
        _check_target(target, force)
        work.acquire()
        try:
            rows = Parts(work.root / "rows", work.identity, force)
            if not rows.found:
                for name in ("statistics", "statistics.partial", "models", f"{CURVES_FILE}.partial"):
                    shutil.rmtree(work.root / name, ignore_errors=True)
                (work.root / CURVES_FILE).unlink(missing_ok=True)
            run = _Run(
                checkpoint,
                candidates,
                data,
                held,
                work.root,
                bool(mixed),
                sequential,
                keep,
                memory,
                check,
                progress or Progress(),
            )
            curves = run.curves()
            ways: dict[str, Any] = dict(candidates)
            for bits in mixed:
                ways[f"mixed {bits:g}"] = _Mixed(bits, candidates, curves, measure, together)
            for number, (label, way) in enumerate([("original", None), *ways.items()]):
                if number not in rows:
                    rows.put(number, Part(report={str(number): run.row(label, way, curves)}))
            report = rows.report()
            original = report.pop("0")
            ordered = [report[str(number)] for number in range(1, len(ways) + 1)]
            found = _verdict({**known, "original": original, "rows": ordered}, tolerance, budget)
            found |= {
                "held_out": int(original["scores"]["tokens"]),
                "seconds": run.seconds,
                "layers": _by_layer(curves),
                "frontier": _frontier(curves, measure, together) if mixed else [],
            }
            shutil.rmtree(work.files, ignore_errors=True)
            work.files.mkdir()
            (work.files / JSON_FILE).write_text(
                json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
            )
            shutil.copyfile(work.root / CURVES_FILE, work.files / CURVES_FILE)
            if keep:
                shutil.move(work.root / "models", work.files / "models")
            work.publish(force, single_file=False)
            return found
        except Exception as error:
            if isinstance(error, RecipeError | CheckpointError) and not any((work.root / "rows").glob("*.safetensors")):
                work.remove()  # a second try would fail as this did
            with disk_errors(work.root):
                raise
        finally:
            work.release()


class _Mixed:
    """A choice for each layer, made when it is its turn, so that one that is not possible is a row with the reason."""

    def __init__(self, bits: float, candidates: Mapping[str, Change], curves: Curves, measure: str, together: Any):
        self.arguments = {"target_bits": bits, "measure": measure, "together": together, "curves": curves}
        self.candidates = candidates

    def choose(self, model: Checkpoint) -> Chosen:
        return choose_bits(model, self.candidates, **self.arguments)


class _Run:
    """Files of one comparison."""

    def __init__(
        self, checkpoint: Checkpoint, candidates: Mapping[str, Change], data: list[Any], held_out: list[Any], root: Path,
        block_errors: bool, sequential: bool, keep: bool, memory: int, check: bool, progress: Progress,
    ):  # fmt: skip
        self.checkpoint, self.candidates, self.data, self.held_out, self.root = (
            checkpoint,
            candidates,
            data,
            held_out,
            root,
        )
        self.block_errors, self.sequential, self.keep, self.memory, self.check, self.progress = (
            block_errors,
            sequential,
            keep,
            memory,
            check,
            progress,
        )
        self.seconds: float | None = None
        self.statistics: Statistics | None = None

    def curves(self) -> Curves:
        """The one pass: statistics of the original model, and from them all errors."""
        began, folder, file = time.perf_counter(), self.root / "statistics", self.root / CURVES_FILE
        needed = {k for c in self.candidates.values() for k in c.needs}
        kinds = [k for k in KINDS if k == "gram" or k in needed]
        fresh = not (folder / STATISTICS_FILE).is_file()
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
            collect(
                self.checkpoint,
                self.data,
                kinds,
                output=folder,
                memory=self.memory,
                check=self.check,
                progress=self.progress,
            )
        self.statistics = Statistics.load(folder)
        if not file.is_file():
            data = self.data if self.block_errors else None
            error_curves(
                self.checkpoint, self.candidates, data, statistics=self.statistics, block_errors=self.block_errors, output=file,
                memory=self.memory, check=False, progress=self.progress,
            )  # fmt: skip
            if fresh:  # of a run that was not stopped
                self.seconds = round(time.perf_counter() - began, 2)
        return Curves.load(file)

    def row(self, label: str, way: Any, curves: Curves) -> dict[str, Any]:
        """Make, score and remove one candidate; None is the original."""
        row: dict[str, Any] = dict.fromkeys(("bytes", "bits_per_weight", "loss", "seconds"))
        row = {"candidate": label, **row, "scores": {}, "pareto": False, "failed": ""}
        if way is None:
            row["bytes"] = sizes_of(self.checkpoint)["bytes"]
            row["scores"] = _finite(
                evaluate(self.checkpoint, self.held_out, memory=self.memory, progress=self.progress)
            )
            return row
        folder = self.root / "models" / _file_name(label)
        folder.parent.mkdir(exist_ok=True)
        try:
            chosen = way.choose(self.checkpoint) if isinstance(way, _Mixed) else None
            config, form = (way, AUTO) if chosen is None else (chosen.config, chosen.format)
            began = time.perf_counter()
            if not folder.exists():
                changes = list(config.values()) if isinstance(config, Mapping) else [config]
                walks = self.sequential or any(c.runs_blocks() for c in changes)
                quantize_model(
                    self.checkpoint, folder, config, self.data if walks else None,
                    format=form,
                    statistics=None if self.sequential else self.statistics, memory=self.memory, check=False,
                    progress=self.progress,
                )  # fmt: skip
                row["seconds"] = round(time.perf_counter() - began, 2)
            with closing(open_checkpoint(folder)) as made:
                sizes = sizes_of(made)
            row["bytes"], row["bits_per_weight"] = sizes["bytes"], sizes["bits_per_weight"]
            scores = evaluate(folder, self.held_out, self.checkpoint, memory=self.memory, progress=self.progress)
            row["scores"] = _finite(scores)
            kind = next((k for k in LOSSES if k in scores), "")
            bad = [k for k, v in scores.items() if math.isnan(v) or (k == kind and not math.isfinite(v))]
            if bad or not kind:
                raise CheckpointError(f"its outputs are not finite: {', '.join(bad) or 'nothing'} is no number")
            row["loss"] = scores[kind]
        except (OutputError, MissingDependencyError):
            raise  # a full disk is no fault of the candidate
        except FAILURES as error:
            row["failed"] = str(error) or type(error).__name__
        shutil.rmtree(WorkFolder(folder).root, ignore_errors=True)  # of what failed
        if not self.keep and folder.exists():
            removed = self.root / "removed"
            shutil.rmtree(removed, ignore_errors=True)
            os.rename(folder, removed)  # else a kill could leave a part of a model that looks finished
            shutil.rmtree(removed, ignore_errors=True)
        return row


def _verdict(found: dict[str, Any], tolerance: float | None, budget: int | None) -> dict[str, Any]:
    """Mark the rows that nothing beats, and name the best."""
    good = [row for row in found["rows"] if not row["failed"]]
    for row in good:
        row["pareto"] = not any(_beats(other, row) for other in good)
    kinds = [k for k in LOSSES if any(k in row["scores"] for row in good)]
    found["score"] = kinds[0] if kinds else next(iter(LOSSES))
    tolerance = LOSSES[found["score"]] if tolerance is None else tolerance
    found |= {"tolerance": tolerance, "budget": budget, "best": None}
    if not good:
        first = found["rows"][0]
        return {**found, "verdict": f"No candidate could be made and scored. {first['candidate']}: {first['failed']}"}
    if budget is not None:
        fits = [row for row in good if row["bytes"] <= budget]
        best = min(fits, key=lambda row: (row["loss"], row["bytes"]), default=None)
        why = f"has the least loss of those of at most {budget:,} bytes"
        none = f"None is of at most {budget:,} bytes; the smallest is"
    else:
        fits = [row for row in good if row["loss"] <= tolerance]
        best = min(fits, key=lambda row: (row["bytes"], row["loss"]), default=None)
        why = f"is the smallest with a loss of at most {tolerance:g}"
        none = f"None has a loss of at most {tolerance:g}; the nearest is"
    if best is None:
        key = (
            (lambda row: (row["bytes"], row["loss"]))
            if budget is not None
            else (lambda row: (row["loss"], row["bytes"]))
        )
        near = min(good, key=key)
        verdict = f"{none} {near['candidate']}"
    else:
        near, found["best"] = best, best["candidate"]
        verdict = f"{best['candidate']} {why}"
    share = near["bytes"] / max(found["original"]["bytes"], 1)
    return {
        **found,
        "verdict": f"{verdict}: {near['bytes']:,} bytes ({share:.0%} of the original), {found['score']} {near['loss']:.3g}.",
    }


def _beats(other: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    mine, its = (row["bytes"], row["loss"]), (other["bytes"], other["loss"])
    return its != mine and its[0] <= mine[0] and its[1] <= mine[1]


def _frontier(curves: Curves, measure: str, together: Any) -> list[list[float]]:
    """Bits per weight, and the least error that they allow."""
    size = sum(curves.sizes.values())
    try:
        return [[8 * nbytes / size, error] for nbytes, error in curves.frontier(measure, together=together).points(100)]
    except RecipeError:  # no candidate fits every layer: rows say so
        return []


def _by_layer(curves: Curves) -> dict[str, dict[str, float | None]]:
    return {
        name: {label: one.errors.get("relative") for label, one in layer.candidates.items()}
        for name, layer in curves.layers.items()
    }


def _finite(scores: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON can say."""
    return {k: v for k, v in scores.items() if math.isfinite(v)}


def _file_name(label: str) -> str:
    """A label as a folder's name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label).lstrip(".") or "candidate"


def _check_target(target: Path, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise OutputError(f"{target}: exists already. Choose another output, or replace it with --force.")
    try:
        if "rows" in read_json(target / JSON_FILE):
            return
    except (WeftError, OSError):
        pass
    raise OutputError(f"{target}: exists and holds no comparison, so --force does not replace it.")
