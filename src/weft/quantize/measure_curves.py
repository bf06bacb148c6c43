"""What each candidate configuration costs in each layer, from one pass over calibration data.

    curves = error_curves("model/", {"2": GPTQ(bits=2), "4": GPTQ(bits=4)}, batches, output="curves.json")
    chosen = choose_bits("model/", candidates, curves=curves, target_bits=3)      # a configuration for every layer

A block is loaded, its statistics are gathered once, each candidate's ``fit`` runs on each of its layers, and the walk goes
on with the original weights. With Δ = Ŵ − W (out, in), G = Σ xᵀx over T inputs, h (T, width) what the block returns:

==============  ==================================  ================================================================
measure         of a layer and a candidate          sums over layers mean
==============  ==================================  ================================================================
``weight``      ‖Δ‖² / ‖W‖²                         how far weights move, each layer counting the same
``output``      tr(Δ G Δᵀ) / T                      change of outputs in their own units: later and larger layers count
                                                    more, as hidden states grow along a network
``relative``    tr(Δ G Δᵀ) / tr(W G Wᵀ)             change of outputs, each layer counting the same
``block``       mean of ‖hₜ(Ŵ) − hₜ‖² / ‖hₜ‖²       change of the hidden states behind the block, in units of their size:
                                                    one unit for all layers, whatever becomes of a layer's output
``importance``  Σ |g Δ| + ½ Σ F Δ²                  change of the loss, to second order, from its gradient g and Fisher
                                                    diagonal F (:func:`weft.calibrate.collect`)
==============  ==================================  ================================================================

``block`` runs each block once more for each of its layers and candidates, with some thousand tokens; where there is data it is what
choices are made by, as the others go wrong where layers differ in what becomes of their outputs. ``importance`` is
:func:`weft.quantize.importance` (arXiv:2308.07662), whose gradients need the whole model in memory once. The others cost
nothing beside the fits.

Bytes are those of the files: the layer's tensors in the format that says all candidates, scales rounded to its type.
Layers that too few rows reached take what the candidate does without data, as they will in :func:`quantize_model`; of
one that no row reached ``relative`` is ``weight``, as for inputs of which nothing is known.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft
from weft.calibrate import BlockTask, Change, Statistics
from weft.calibrate.collectors import KINDS
from weft.calibrate.describe import describe
from weft.calibrate.experts import unfused
from weft.calibrate.facts import Facts
from weft.calibrate.forward import digest_of, hidden_of
from weft.calibrate.parts import Part, Parts
from weft.calibrate.rewrite import Loaded
from weft.calibrate.source import InMemory, open_source
from weft.calibrate.walker import Block, Walk
from weft.calibrate.watch_block import block_layers, results_of, two_axes, watched
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.engine.journal import WorkFolder
from weft.engine.progress import Progress
from weft.errors import CheckpointError, OutputError, RecipeError, WeftError, disk_errors
from weft.function.layout import is_conv1d, layout_of
from weft.function.where import Selector, nearest_names
from weft.packed import Packed
from weft.packed.formats import find_format
from weft.quantize.curves import Candidate, Curves, LayerCurve, layer_from
from weft.quantize.files import PackedFiles
from weft.quantize.gradient_ptq import importance
from weft.quantize.run import AUTO, as_in_files, file_format

BLOCK_TOKENS = 4096  # a mean over so many is known to some percent
FISHER = ("exact", "sampled", "empirical")
Candidates = Mapping[str, Change | None]
# what a method may raise, of weft or of one's own: its candidate is out, the others go on
FAILURES = (WeftError, torch.linalg.LinAlgError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


def error_curves(
    model: nn.Module | Checkpoint | str | Path,
    candidates: Candidates,
    batches: Iterable[Any] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    gradients: Statistics | str | os.PathLike[str] | None = None,
    block_errors: bool = False,
    block_tokens: int = BLOCK_TOKENS,
    where: Selector = "*",
    blocks: str | Sequence[str] = (),
    format: str = AUTO,
    memory: int = 1 << 30,
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> Curves:
    """Measure every candidate in every layer of a model's blocks.

    Memory: one block, its statistics, the hidden states within ``memory``, and a layer's packed weight and matrices (with
    ``block_errors`` a matrix for each candidate).

    Args:
        model: a folder, Hub id, open checkpoint, or module with a list of blocks.
        candidates: configurations by label; None stands for the layer as it is.
        batches: calibration data; may be missing where there are ``statistics``.
        output: a JSON file to write. A run that is killed is begun again with the same call and goes on behind the last
            finished block.
        statistics: gathered before (:func:`weft.calibrate.collect`), with ``gram`` and what the candidates need; then
            nothing is gathered.
        gradients: of ``gradient`` and a ``fisher_…``, for the measure ``importance``; one of them is enough.
        block_errors: measure ``block`` too, with ``batches``, as many of them as have
        block_tokens: tokens, from all over the data.
        where: which layers of the blocks.
        blocks: paths of the lists of blocks, where they are not found.
        format: of files, for bytes and the rounding of scales (:data:`weft.packed.formats.FORMATS`); ``auto``: as
            :func:`weft.quantize.quantize_model` takes it. Of a module in memory nothing is rounded.
        memory, check: see :class:`weft.calibrate.Walk`.
        force: replace an output that holds curves.
        progress: where to report.

    Returns:
        The curves. A candidate that fails in a layer has the reason there, and no errors.

    Raises:
        RecipeError: there are no candidates, no data, or no layers.
        CheckpointError: the model cannot be read or walked, or the statistics are of another.
        OutputError: the output exists or cannot be written.
    """
    if not candidates:
        raise RecipeError("There are no candidates to measure; give configurations by label.")
    held = Statistics.load(statistics) if isinstance(statistics, str | os.PathLike) else statistics
    slopes = Statistics.load(gradients) if isinstance(gradients, str | os.PathLike) else gradients
    data = None if batches is None else list(batches)
    if data is None and (held is None or block_errors):
        raise RecipeError("Error curves need calibration data: give batches, or statistics without block_errors.")
    opened = model if isinstance(model, nn.Module) else open_checkpoint(model)
    with closing(opened) if isinstance(opened, Checkpoint) and opened is not model else nullcontext():
        for given in (held, slopes):
            if given is not None:
                given.check(opened)
        run = _Run(
            opened, candidates, data, held, slopes, max(block_tokens, 1) if block_errors else 0, where, blocks, format, memory, check,
            progress or Progress(),
        )  # fmt: skip
        return run.measure() if output is None else run.measure_into(output, force)


class _Run:
    """One pass; see :func:`error_curves`."""

    def __init__(
        self, model: nn.Module | Checkpoint, candidates: Candidates, data: list[Any] | None, held: Statistics | None,
        slopes: Statistics | None, block_tokens: int, where: Selector, blocks: str | Sequence[str], format: str, memory: int,
        check: bool, progress: Progress,
    ):  # fmt: skip
        self.model, self.data, self.held, self.slopes = model, data, held, slopes
        self.block_tokens, self.where, self.memory, self.check = block_tokens, where, memory, check
        self.progress = progress
        self.source: InMemory = open_source(model, blocks)
        self.dtype: torch.dtype = next((p.dtype for p in self.source.model.parameters()), torch.float32)
        self.files: PackedFiles | None = None
        changes = {label: c for label, c in candidates.items() if c is not None}
        if isinstance(model, Checkpoint) and changes:
            turned = any(is_conv1d(type(m)) for m in self.source.model.modules())
            form = find_format(("weft" if turned else file_format(changes)) if format == AUTO else format)
            self.files = PackedFiles(form, self.dtype)
            changes = as_in_files(changes, form, self.dtype)
        self.candidates: dict[str, Change | None] = {label: changes.get(label) for label in candidates}
        settings = {label: describe(c) if c is not None else None for label, c in self.candidates.items()}
        self.facts: dict[str, Any] = {
            "model": model.name if isinstance(model, Checkpoint) else type(model).__name__,
            "format": self.files.form.name if self.files else AUTO,
            "candidates": settings,
            "data": None if data is None else digest_of(data),
            "batches": None if data is None else len(data),
        }

    def measure(self) -> Curves:
        """All blocks, in memory."""
        seen: list[tuple[str, nn.Module]] = []
        layers: dict[str, LayerCurve] = {}
        for block in self.blocks(None):
            seen += block.linears().items()
            layers |= self.block(block)
            self.progress.advance(block.name, 1)
        return self.curves(layers, seen)

    def measure_into(self, output: str | os.PathLike[str], force: bool) -> Curves:
        """All blocks, each kept on disk when it is finished."""
        target = Path(os.path.abspath(Path(output).expanduser()))
        work = WorkFolder(target)
        work.identity = digest_of([
            weft.__version__, self.source.weights_identity(), json.dumps(self.facts, sort_keys=True, default=str),
            repr(self.where), self.block_tokens,
            *(None if s is None else s.facts.provenance for s in (self.held, self.slopes)),
        ])  # fmt: skip
        if work.tidy() == work.identity:  # this very run was killed when all was done
            return Curves.load(target)
        _check_target(target, force)
        work.acquire()
        try:
            parts = Parts(work.root / "parts", work.identity, force)
            seen: list[tuple[str, nn.Module]] = []
            for block in self.blocks(work.root / "walk"):
                seen += block.linears().items()
                if block.number not in parts:
                    found = self.block(block)
                    parts.put(block.number, Part(report={n: asdict(curve) for n, curve in found.items()}))
                self.progress.advance(block.name, 1)
            curves = self.curves({n: layer_from(entry) for n, entry in parts.report().items()}, seen)
            work.files.mkdir(exist_ok=True)
            made = work.files / target.name
            made.write_text(curves.to_json(), encoding="utf-8")
            with made.open("rb") as file:
                os.fsync(file.fileno())
            work.publish(force, single_file=True)
            return curves
        except (RecipeError, CheckpointError):
            work.remove()  # a second try would fail as this did
            raise
        except OSError:
            with disk_errors(work.root):
                raise
        finally:
            work.release()

    def curves(self, layers: dict[str, LayerCurve], seen: list[tuple[str, nn.Module]]) -> Curves:
        """What was measured, if anything was."""
        if not layers:
            raise RecipeError(f"No layer was chosen by {self.where!r}.{nearest_names(self.where, seen)}")
        return Curves(layers, self.facts)

    def blocks(self, folder: Path | None) -> Iterator[Block]:
        """Blocks of the original model, with inputs where there is data to run on."""
        names = [n for stack in self.source.stacks for n in stack]
        self.progress.start("measuring", len(names), len(names), "blocks")
        if self.data is not None and (self.held is None or self.block_tokens):
            with Walk(self.source, self.data, memory=self.memory, folder=folder, check=self.check) as walk:
                done = 0
                for block in walk:
                    for number in range(done, block.number):
                        self.progress.advance(f"block {number} of an earlier run", 1)
                    done = block.number + 1
                    yield block
            return
        for number, name in enumerate(names):
            self.source.load([name])
            module = self.source.model.get_submodule(name)
            with unfused(module, name) as experts:
                yield Block(name, number, module, Loaded(self.source), dict(experts))
            self.source.drop([name])

    @torch.no_grad()
    def block(self, block: Block) -> dict[str, LayerCurve]:
        """All candidates in all layers of a block, which stays as it is."""
        layers = block_layers(block, self.where)
        if not layers:
            return {}
        statistics = self.held or self.gathered(block, layers)
        task = BlockTask(block, layers, statistics)
        before = self.before(block) if self.block_tokens else []
        made = {}
        for name in layers:
            leader, rows = statistics.facts.layers.get(name, (name, 0))
            weight = task.weight(name)
            curve = made[name] = LayerCurve(block.name, leader, weight.numel(), rows)
            values = {label: self.candidate(task, name, label, weight, curve) for label in self.candidates}
            if self.block_tokens:
                moved = {label: v for label, v in values.items() if v is not None}
                for label, error in _behind(block, layers[name], weight, moved, before).items():
                    curve.candidates[label].errors["block"] = error
            for label, one in curve.candidates.items():
                bad = [m for m, e in one.errors.items() if not math.isfinite(e)]
                if bad:
                    curve.candidates[label] = Candidate(one.nbytes, {}, one.seconds, f"{', '.join(bad)} is not finite")
        return made

    def gathered(self, block: Block, layers: Mapping[str, nn.Module]) -> Statistics:
        """Statistics of the block's inputs; if nothing else runs it, this is also the run that gives its outputs."""
        needed = [k for c in self.candidates.values() if c is not None for k in c.needs]
        kinds = [k for k in KINDS if k == "gram" or k in needed]
        with watched(block, kinds, layers=layers) as watch:
            block.run(keep=not self.block_tokens)
        facts = Facts()
        found = results_of(watch, layers, facts, fingerprints=False)
        return Statistics({n: t.float() if t.is_floating_point() else t for n, t in found}, facts)

    def candidate(self, task: BlockTask, name: str, label: str, weight: Tensor, curve: LayerCurve) -> Tensor | None:
        """Fit one candidate; its matrix as the layer would have it, None if it failed."""
        change, layer = self.candidates[label], task.layers[name]
        one = curve.candidates[label] = Candidate()
        began = time.perf_counter()
        try:
            made = None if change is None else task.instead(name, change).fit(name, weight.clone(), task.statistics)
            one.seconds = round(time.perf_counter() - began, 3)
            stored: Any = layer.weight
            one.nbytes = weight.numel() * stored.element_size()
            if isinstance(made, Packed):
                made, one.nbytes = self.in_files(task.block, name, layer, made)
            value = weight if made is None else made.dequantize() if isinstance(made, Packed) else made
            if value.shape != weight.shape:
                raise RecipeError(f"it returned {list(value.shape)} for {list(weight.shape)}")
            value = value.to(stored.dtype).float()
            if not value.isfinite().all():
                raise RecipeError("the fitted weight holds NaN or infinite values")
        except FAILURES as error:
            one.failed = str(error) or type(error).__name__
            return None
        one.errors = self.errors(name, layer, value - weight, weight, task.statistics)
        return value

    def in_files(self, block: Block, name: str, layer: nn.Module, packed: Packed) -> tuple[Packed, int]:
        """A packed weight as files have it, and its bytes there: of its type, where they have no tensor of its own for it."""
        if self.files is None:
            return packed, packed.nbytes
        fitted = self.files.round(packed)
        part = self.files.part(
            {name: layer}, {name: fitted}, self.source.stored_names(block.name, {name: layer}), {name: {}}
        )
        stored: Any = layer.weight
        made = sum(t.nbytes for t in part.tensors.values())
        return fitted, made or packed.shape[0] * packed.shape[1] * stored.element_size()

    def errors(
        self, name: str, layer: nn.Module, delta: Tensor, weight: Tensor, statistics: Statistics
    ) -> dict[str, float]:
        """What is known without running anything."""
        whole = float(weight.square().sum(dtype=torch.float64))
        found = {"weight": float(delta.square().sum(dtype=torch.float64)) / whole if whole else 0.0}
        rows = statistics.facts.layers.get(name, ("", 0))[1]
        if statistics.has(name, "gram"):
            gram = statistics.gram(name)
            moved, before = _through(delta, gram), _through(weight, gram)
            found |= {"output": moved / rows, "relative": moved / before if before > 0 else 0.0}
        elif not rows:
            found |= {"output": 0.0, "relative": found["weight"]}
        if self.slopes is not None:
            cost = _importance(name, layer, weight, weight + delta, self.slopes)
            if cost is not None:
                found["importance"] = cost
        return found

    def before(self, block: Block) -> list[tuple[int, Tensor, Tensor | None]]:
        """Batches with as many tokens as are wanted: number, hidden states behind the block, which tokens count."""
        assert self.data is not None
        found, tokens = [], 0
        for number in sorted(range(len(self.data)), key=_spread):
            if tokens >= self.block_tokens:
                break
            hidden = _hidden(block, number)
            mask = two_axes(self.data[number], "attention_mask")
            counts = mask.bool() if mask is not None and mask.shape == hidden.shape[:2] else None
            found.append((number, hidden, counts))
            tokens += hidden[..., 0].numel() if counts is None else int(counts.sum())
        return found


def _behind(
    block: Block, layer: nn.Module, weight: Tensor, values: Mapping[str, Tensor], before: list[tuple[int, Tensor, Tensor | None]]
) -> dict[str, float]:  # fmt: skip
    """How much of the hidden states behind the block changes with each value of a layer's matrix."""
    found = {}
    try:
        for label, value in values.items():
            _set(layer, value)
            shares = []
            for number, hidden, counts in before:
                change = (_hidden(block, number) - hidden).double().square().sum(-1)
                share = change / hidden.double().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
                shares.append((share if counts is None else share[counts]).flatten())
            found[label] = float(torch.cat(shares).mean()) if any(s.numel() for s in shares) else 0.0
    finally:
        _set(layer, weight)
    return found


def _spread(number: int) -> float:
    """Orders numbers so that any first few of them come from all over: multiples of the golden ratio."""
    return number * 0.6180339887498949 % 1


def _hidden(block: Block, number: int) -> Tensor:
    args, kwargs = block.batch(number)
    return hidden_of(block.module(*args, **kwargs), block.name).float()


def _set(layer: Any, matrix: Tensor) -> None:
    layout = layout_of(layer, "weight", layer.weight)
    layer.weight.copy_(layout.stored(matrix.reshape(layout.seen(layer.weight).shape)))


def _through(matrix: Tensor, gram: Tensor) -> float:
    """tr(M G Mᵀ); of a convolution with groups, each run of rows has a G of its own."""
    if gram.dim() == 2:
        return float(((matrix @ gram.float()) * matrix).sum(dtype=torch.float64))
    return math.fsum(_through(m, g) for m, g in zip(matrix.chunk(len(gram)), gram))


def _importance(name: str, layer: nn.Module, weight: Tensor, value: Tensor, slopes: Statistics) -> float | None:
    """Σ |g Δ| + ½ Σ F Δ²; None if neither is known of the layer."""
    key, known = f"{name}.weight", set(slopes.names)
    kind = next((k for k in FISHER if f"{key}/fisher_{k}" in known), "")
    if not kind and f"{key}/gradient" not in known:
        return None
    nothing = torch.zeros_like(weight)
    gradient = _seen(layer, slopes.gradient(key)) if f"{key}/gradient" in known else nothing
    fisher = _seen(layer, slopes.fisher(key, kind)) if kind else nothing
    return float(importance(weight, value, gradient, fisher).sum())


def _seen(layer: nn.Module, value: Tensor) -> Tensor:
    """A statistic of a parameter as the matrix (out, in) that its layer multiplies by."""
    return layout_of(layer, "weight", value).seen(value).flatten(1)


def _check_target(target: Path, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise OutputError(f"{target}: exists already. Choose another output, or replace it with force.")
    try:
        Curves.load(target)
    except WeftError:
        raise OutputError(f"{target}: exists and holds no error curves, so force does not replace it.") from None
