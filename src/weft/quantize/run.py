"""Quantise a model: one configuration for all layers, or one for each pattern of names; on disk or in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.calibrate import Change, Statistics, change_model_, rewrite
from weft.calibrate.change_model import Changed
from weft.calibrate.describe import describe
from weft.calibrate.rewrite import write_blocks
from weft.calibrate.source import FromCheckpoint
from weft.checkpoint.checkpoint import Checkpoint
from weft.checkpoint.open import open_checkpoint
from weft.engine.checkpoint_writer import SHARD_BYTES
from weft.engine.progress import Progress
from weft.function.layout import is_conv1d
from weft.function.where import Selector
from weft.packed.formats import Format, find_format
from weft.packed.replace import replace_
from weft.quantize.files import PackedFiles
from weft.quantize.inputs import QuantizedInputs
from weft.quantize.schemes import find_scheme

AUTO, DENSE = "auto", "dense"


def quantize_(
    model: nn.Module,
    config: Change | Mapping[Any, Change] | str,
    calibration: Iterable[Any] | None = None,
    *,
    where: Selector = "*",
    statistics: Statistics | str | Path | None = None,
    blocks: str | Sequence[str] = (),
    seed: int = 0,
    skip_errors: bool = False,
    pack: bool = True,
    backend: str = "auto",
    memory: int = 1 << 30,
    autocast: bool = True,
    progress: Progress | None = None,
) -> Changed:
    """Quantise a model in memory, in place.

    Each block is quantised with the inputs that the quantised blocks before it give.

    Args:
        model: any module; of a model without a list of blocks, all layers are quantised with the inputs of the original.
        config: a quantiser's configuration (:mod:`weft.quantize`), the name of a scheme (:mod:`weft.quantize.schemes`), or a
            mapping from selectors (:mod:`weft.function.where`) to configurations, of which the most specific decides. Layers outside of blocks (embeddings, the output head) are chosen
            only by selectors that name them.
        calibration: batches, each a tensor, a tuple of positional or a mapping of named arguments; None for methods that
            need none.
        where: which layers of the blocks.
        statistics: gathered before, see :func:`weft.calibrate.rewrite`.
        blocks: paths of the lists of blocks, where they are not found.
        seed: of what is drawn.
        skip_errors: leave a layer as it is where its method fails, with a warning.
        pack: put layers over packed weights in their place (:class:`weft.packed.QuantizedLinear`); otherwise layers stay, with
            weights that are the quantised values. Convolutions always stay.
        backend: of these layers.
        memory: bytes of hidden states to keep in memory.
        autocast: see :class:`weft.calibrate.Walk`; not done for methods that read the original model's hidden states.
        progress: where to report.

    Returns:
        Packed weights and facts by layer.

    Raises:
        RecipeError: nothing was chosen, data is missing, or a layer does not fit the method (its width and the groups).
        NonFiniteError: a layer's weights or inputs are not finite.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> from weft.quantize import GPTQ
    >>> made = quantize_(model, GPTQ(bits=4, group_size=4), [torch.randn(32, 8)])
    >>> type(model[0]).__name__, sorted(made.report)
    ('QuantizedLinear', ['0', '2'])
    """
    if isinstance(config, str):
        config = find_scheme(config).config()
    made = change_model_(
        model, calibration, config, where=where, statistics=statistics, blocks=blocks, seed=seed, skip_errors=skip_errors,
        memory=memory, autocast=autocast, progress=progress,
    )  # fmt: skip
    if pack:
        layers = {n: p for n, p in made.packed.items() if not hasattr(_submodule(model, n), "kernel_size")}
        if layers:
            replace_(model, layers, backend=backend)
    return made


def quantize_model(
    model: Checkpoint | str | Path,
    output: str | os.PathLike[str],
    config: Change | Mapping[Any, Change] | str,
    batches: Iterable[Any] | None = None,
    *,
    format: str = AUTO,
    where: Selector = "*",
    statistics: Statistics | str | os.PathLike[str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    seed: int = 0,
    skip_errors: bool = False,
    memory: int = 1 << 30,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    check: bool = True,
    autocast: bool = True,
    progress: Progress | None = None,
    timings: dict[str, float] | None = None,
) -> Path:
    """Write a quantised copy of a transformers model; one block is in memory at a time.

    Each block is quantised with the inputs that the quantised blocks before it give. ``weft.json`` holds each layer's error,
    and names the layers that too few rows of the data reached, which are quantised without data. A run that is killed is
    begun again with the same call, goes on behind the last finished block, and ends in the same bytes.

    Args:
        model: a folder, Hub id or open checkpoint.
        output: the folder.
        config, where, statistics, seed, skip_errors, memory, autocast: see :func:`quantize_`.
        batches: calibration data.
        format: of the files (:data:`weft.packed.formats.FORMATS`); ``auto``: that of the scheme, or the one that most
            programs load and that says what the configuration makes; ``dense``: the model's own type, with weights that are
            the quantised values.
        recipe, shard_bytes, force, check, progress: see :func:`weft.calibrate.rewrite`.
        timings: receives the seconds of each layer.

    Returns:
        The folder. ``weft.open`` reads every format; transformers and vLLM load those that are theirs.

    Raises:
        RecipeError: as of :func:`quantize_`, or the format cannot say the result.
        CheckpointError: the model cannot be read or walked.
        OutputError: the output exists or cannot be written.
    """
    if isinstance(config, str):
        scheme = find_scheme(config)
        config, format = scheme.config(), scheme.file_format if format == AUTO else format
        recipe = {"scheme": scheme.name, **(recipe or describe(config))}
    recipe = {"format": format, **(recipe or describe(config))}
    if format == DENSE:
        return rewrite(
            model, batches, config, output, where=where, statistics=statistics, recipe=recipe, seed=seed,
            skip_errors=skip_errors, memory=memory, shard_bytes=shard_bytes, force=force, check=check, autocast=autocast,
            progress=progress,
        )  # fmt: skip
    checkpoint = open_checkpoint(model)
    try:
        network = FromCheckpoint(checkpoint).model
        turned = any(is_conv1d(type(m)) for m in network.modules())  # matrices (in, out), which weft's own format says
        form = find_format(("weft" if turned else file_format(config)) if format == AUTO else format)
        files = PackedFiles(form, network.dtype)
        files.linears = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
        config = as_in_files(config, form, network.dtype)
        return write_blocks(
            checkpoint, batches, config, output, files, what=(), where=where, statistics=statistics, recipe=recipe,
            seed=seed, skip_errors=skip_errors, memory=memory, shard_bytes=shard_bytes, force=force, check=check,
            autocast=autocast, progress=progress, timings=timings,
        )  # fmt: skip
    finally:
        if checkpoint is not model:
            checkpoint.close()


def file_format(config: Change | Mapping[Any, Change]) -> str:
    """The format of files that says what a configuration makes.

    >>> from weft.quantize import RTN, Codebook
    >>> file_format(RTN()), file_format({"a": RTN(), "b": Codebook()})
    ('pack-quantized', 'weft')
    """
    made = {c.file_format for c in (config.values() if isinstance(config, Mapping) else [config])}
    return made.pop() if len(made) == 1 else "weft"


def as_in_files(config: Any, form: Format, model_dtype: torch.dtype) -> Any:
    """Configurations that fit scales in the type that files of a model have, where they name none of their own."""
    kind = form.scale_dtype(model_dtype)
    return config if kind is None else _with_scales(config, str(kind).removeprefix("torch."))


def _with_scales(config: Any, dtype: str) -> Any:
    if isinstance(config, Mapping):
        return {key: _with_scales(one, dtype) for key, one in config.items()}
    if isinstance(config, QuantizedInputs):
        return replace(config, weights=_with_scales(config.weights, dtype))
    known = {f.name: f.default for f in fields(config)} if is_dataclass(config) else {}
    if "scale_dtype" in known and config.scale_dtype == known["scale_dtype"]:
        return replace(config, scale_dtype=dtype)
    return config


def _submodule(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a single expert
        return None
