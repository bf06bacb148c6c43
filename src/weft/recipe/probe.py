"""Before a baked model is published: does it compute what the base with its live adapters computed?

The outputs probe runs both on a batch of tokens, in float32, so that what differs is the rounding of the weights. It
needs transformers and both models one after the other in memory. Otherwise the products probe multiplies every changed
weight by random vectors, in float64, once as it was written and once as W₀ x + s · B (A x), reading rows a few at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from weft.checkpoint.adapter import with_adapter
from weft.checkpoint.adapter_names import find_places
from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.computed import BLOCK, as_float32
from weft.checkpoint.dtypes import DTYPES
from weft.checkpoint.live_names import live_names
from weft.checkpoint.lora_folder import MissPart, Part, read_adapter
from weft.errors import CheckpointError, RecipeError, WeftError
from weft.kernels.convert import to_float32

Weighted = tuple[Checkpoint, float]
_VECTORS = 4
_BATCH, _LENGTH = 4, 32  # tokens: 128 positions show a wrong layer at once, and cost a moment
_TEXTS, _TEXT_LENGTH = 16, 128


class CannotRunError(WeftError):
    """The outputs probe cannot run here; the message is why."""


def probe_outputs(
    base: Checkpoint, adapters: Sequence[Weighted], made: Path, *, memory: int, seed: int, data: str = ""
) -> dict[str, Any]:
    """Compare outputs of the base with live adapters with those of the baked model.

    Args:
        base: a folder of transformers.
        adapters: with their weights.
        made: the baked model's folder.
        memory: that a model may take in float32.
        seed: of the token ids.
        data: a JSON-lines file with texts, for the model's tokenizer, instead of these.

    Returns:
        ``change``: the largest change of an output, as a share of the largest output; ``largest`` the same as a number;
        ``top1``: share of positions whose largest logit is the same one.

    Raises:
        CannotRunError: why not. RecipeError: the texts cannot be read.
    """
    needed = 4 * base.parameters
    if needed > memory:
        raise CannotRunError(
            f"the model takes {needed / 1e9:.2g} GB in float32, more than the budget of {memory / 1e9:.2g} GB (memory)"
        )
    if any(tensor.stored is not None for tensor in base.values()):
        raise CannotRunError("the base itself is computed when it is read, and is no folder of transformers")
    kinds = [str(a) for a in base.config.get("architectures") or ()]
    if base.folder is None or not kinds or any(a.folder is None for a, _ in adapters):
        raise CannotRunError("the base is no folder of transformers with a config.json that names its architecture")
    try:
        import torch
        import transformers
    except ImportError:
        raise CannotRunError("transformers is not installed") from None
    kind = getattr(transformers, kinds[0], None)
    if kind is None:
        raise CannotRunError(f"transformers has no {kinds[0]}")

    def outputs(folder: Path, live: bool) -> torch.Tensor:
        model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        if live:
            from weft.adapt.folder import load_adapter_
            from weft.adapt.switch import switch_

            names = [f"adapter {i}" for i in range(len(adapters))]
            for name, (adapter, _) in zip(names, adapters):
                load_adapter_(model, str(adapter.folder), name=name, check_base=False, dtype="float32")
            switch_(model, dict(zip(names, (w for _, w in adapters))))
        with torch.no_grad():
            result = model(**batch)
        values = getattr(result, "logits", None)
        return (result[0] if values is None else values).double()

    with _quiet(transformers):
        batch = _batch(base, seed, data)
        try:
            before, after = outputs(base.folder, True), outputs(made, False)
        except Exception as error:  # of any of a thousand models; what it was is said, and the other probe runs
            raise CannotRunError(f"running {kinds[0]} failed: {str(error).splitlines()[0][:300]}") from None
    if "attention_mask" in batch and before.dim() == 3:
        keep = batch["attention_mask"].bool()
        before, after = before[keep], after[keep]
    largest = float((after - before).abs().max())  # NaN if either holds one
    largest = largest if math.isfinite(largest) else math.nan
    return {
        "kind": "outputs",
        "change": largest / max(float(before.abs().max()), 1e-300),
        "largest": largest,
        "top1": float((after.argmax(-1) == before.argmax(-1)).double().mean()),
        "positions": int(np.prod(before.shape[:-1])),
        "on": Path(data).name if data else f"random {'images' if 'pixel_values' in batch else 'tokens'}, seed {seed}",
    }


def _batch(base: Checkpoint, seed: int, data: str) -> dict[str, Any]:
    import torch
    import transformers

    text = base.config.get("text_config")
    sizes = {**(text if isinstance(text, Mapping) else {}), **base.config}
    if not data:
        vocabulary, side = sizes.get("vocab_size"), sizes.get("image_size")
        if vocabulary is None and isinstance(side, int):
            images = (_BATCH, int(sizes.get("num_channels") or 3), side, side)
            return {"pixel_values": torch.randn(images, generator=torch.Generator().manual_seed(seed))}
        if not isinstance(vocabulary, int) or vocabulary < 1:
            raise CannotRunError("the base's config.json says no vocab_size")
        positions = sizes.get("max_position_embeddings") or sizes.get("n_positions") or _LENGTH
        shape = (_BATCH, max(1, min(_LENGTH, int(positions) - 2)))
        return _both_ends(
            {"input_ids": torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))}, sizes
        )
    texts = read_texts(data)[:_TEXTS]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
    except Exception as error:
        raise RecipeError(
            f"{data}: texts need the base's tokenizer, which cannot be loaded ({str(error).splitlines()[0][:200]})."
        ) from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    made = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=_TEXT_LENGTH))
    return _both_ends(made, sizes)


def _both_ends(batch: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """With the same tokens for a decoder beside an encoder."""
    both = config.get("is_encoder_decoder") is True
    return {**batch, "decoder_input_ids": batch["input_ids"]} if both else batch


def read_texts(path: str) -> list[str]:
    """Texts of a JSON-lines file: strings, or objects with a ``text``.

    Raises:
        RecipeError: it is missing, or a line is neither.
    """
    texts: list[str] = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                value = json.loads(line)
                value = value.get("text") if isinstance(value, dict) else value
                if not isinstance(value, str) or not value:
                    raise RecipeError(f'{path}: line {number} is neither a text nor an object with a "text".')
                texts.append(value)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, WeftError):
            raise
        raise RecipeError(f"{path}: cannot be read as JSON lines ({error}).") from None
    if not texts:
        raise RecipeError(f"{path}: holds no texts.")
    return texts


@contextmanager
def _quiet(transformers: Any) -> Any:
    """Without transformers' progress bars and advice, which are for those who load models to use them."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def probe_products(base: Checkpoint, adapters: Sequence[Weighted], made: Checkpoint, *, seed: int) -> dict[str, Any]:
    """Compare products with every changed weight; memory is a block of rows and one weight's factors.

    Args:
        base, adapters: what was baked, and the adapters' weights.
        made: the baked model.
        seed: of the vectors.

    Returns:
        ``change``: the largest change of a product, as a share of the largest of its tensor; ``worst``: that tensor;
        ``tensors``: how many there are; ``by_value``: how many of them have no two factors (whole copies, rows, biases,
        DoRA, Bat), and were compared value by value with what the adapter's reader computes.

    >>> import numpy as np, weft
    >>> from weft.checkpoint.memory import from_mapping
    >>> A, B = np.ones((1, 3), np.float32), np.ones((2, 1), np.float32)
    >>> adapter = from_mapping({"fc.lora_A.weight": A, "fc.lora_B.weight": B}, "adapter")
    >>> adapter.config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    >>> base = weft.open({"fc.weight": np.zeros((2, 3), np.float32)})
    >>> right, wrong = (weft.open({"fc.weight": np.full((2, 3), v, np.float32)}) for v in (1, 2))
    >>> [round(probe_products(base, [(adapter, 1.0)], m, seed=0)["change"], 6) for m in (right, wrong)]
    [0.0, 1.0]
    """
    low, others = _changes(base, adapters)
    reader = base
    for adapter, weight in adapters:
        reader = with_adapter(reader, adapter, weight)
    worst, change = "", 0.0
    for number, name in enumerate(sorted(low)):
        wanted, got = _products(base[name], made[name], low[name], np.random.default_rng([seed, number]))
        off = _share(got, wanted)
        worst, change = (name, off) if off >= change else (worst, change)
    for name in sorted(others):
        if name not in made:
            raise CheckpointError(f"the baked model lacks {name}, which an adapter changes.")
        off = _off_by_value(made[name], reader[name])
        worst, change = (name, off) if off >= change else (worst, change)
    return {
        "kind": "products",
        "change": change if math.isfinite(change) else math.nan,
        "worst": worst,
        "tensors": len(low) + len(others),
        "by_value": len(others),
        "on": f"{_VECTORS} random vectors for each, seed {seed}",
    }


def _share(got: np.ndarray, wanted: np.ndarray) -> float:
    if not np.isfinite(got).all():
        return math.inf
    difference = np.abs(got.astype(np.float64) - wanted).max(initial=0.0)
    return float(difference / max(float(np.abs(wanted).max(initial=0.0)), 1e-300)) if difference else 0.0


def _off_by_value(made: LazyTensor, wanted: LazyTensor) -> float:
    """As :func:`_share` of all values, which are read a block at a time."""
    if made.shape != wanted.shape:
        return math.inf
    difference = largest = 0.0
    for first in range(0, made.size, BLOCK):
        got, goal = (_values(t, first, min(BLOCK, made.size - first)) for t in (made, wanted))
        if not np.isfinite(got).all():
            return math.inf
        difference = max(difference, float(np.abs(got.astype(np.float64) - goal).max()))
        largest = max(largest, float(np.abs(goal).max()))
    return difference / max(largest, 1e-300)


def _values(tensor: LazyTensor, first: int, count: int) -> np.ndarray:
    """Values of a tensor from one of its elements on; of whole numbers, too."""
    width = tensor.dtype.bits // 8
    raw = np.empty(count * width, np.uint8)
    tensor.read_into(raw.data, first * width)
    bits = raw.view(tensor.dtype.numpy)
    return bits if tensor.dtype is DTYPES["F64"] or not tensor.dtype.floating else to_float32(bits, tensor.dtype)


Change = tuple[np.ndarray, np.ndarray]  # left (rows, rank), right (rank, columns), scaled


def _changes(base: Checkpoint, adapters: Sequence[Weighted]) -> tuple[dict[str, list[Any]], set[str]]:
    """Tensors whose change is a sum of products -> how to get the factors; and all others that change."""
    low: dict[str, list[Any]] = {}
    others: set[str] = set()
    names = base
    for adapter, weight in adapters:
        parsed = read_adapter(adapter)
        saved = [str(m) for m in adapter.config.get("modules_to_save") or ()]
        changed = with_adapter(names, adapter, weight)
        place = find_places(parsed, {*changed, *names}, saved, changed.name, live=lambda: live_names(base))
        for module, part in parsed.parts.items():
            name = place[module]
            if part.bias is not None:
                others.add(name.removesuffix("weight") + "bias")
            if name not in base or parsed.config.dora or part.tied or (isinstance(part, MissPart) and part.bat):
                others.add(name)
            else:
                low.setdefault(name, []).append((part, parsed.config, weight))
        others |= {place[n] for n in (*parsed.whole, *parsed.originals, *parsed.rows)}
        names = changed
    for name in others & low.keys():
        del low[name]
    return low, {n for n in others if n in names}


def _factors(part: Part | MissPart, config: Any, weight: float, shape: tuple[int, ...]) -> Change:
    if isinstance(part, MissPart):
        block = as_float32(part.block).astype(np.float64) * weight
        rank, columns = len(block), shape[1]
        return np.tile(block.T, (shape[0] // block.shape[1], 1)), (
            np.arange(columns) % rank == np.arange(rank)[:, None]
        )
    down, up = as_float32(part.down).astype(np.float64), as_float32(part.up).astype(np.float64)
    down, up = down.reshape(len(down), -1), up.reshape(up.shape[0], -1) * (part.scale * weight)
    return (down.T, up.T) if part.flipped(shape, config) else (up, down)


def _products(
    before: LazyTensor, after: LazyTensor, parts: Sequence[Any], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What the changed weight times random vectors must be, and what the baked one gives; (rows, vectors) each."""
    rows = before.shape[0]
    columns = before.size // max(rows, 1)
    x = random.standard_normal((columns, _VECTORS))
    wanted, got = _times(before, x), _times(after, x)
    for part, config, weight in parts:
        left, right = _factors(part, config, weight, before.shape)
        wanted += left @ (right @ x)
    return wanted, got


def _times(tensor: LazyTensor, x: np.ndarray) -> np.ndarray:
    rows, columns = tensor.shape[0], len(x)
    result = np.empty((rows, x.shape[1]))
    step = max(1, BLOCK // max(columns, 1))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        values = _values(tensor, first * columns, count * columns)
        with np.errstate(invalid="ignore"):  # infinity is found in the result
            result[first : first + count] = values.reshape(count, columns) @ x
    return result
