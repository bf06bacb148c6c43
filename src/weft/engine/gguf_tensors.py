"""The tensors of a GGUF file that is to be written: their names, types and bytes, made piece by piece.

They come from another GGUF file (kept, or encoded anew) or from a transformers model (renamed, rows put in pairs where the
architecture turns them so, encoded; packed weights bit for bit where GGUF can say them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.checkpoint.checkpoint import Checkpoint, LazyTensor
from weft.checkpoint.gguf import GGUFCheckpoint
from weft.checkpoint.gguf_blocks import GGMLType, encode_blocks, encode_weighted, ggml_type, keep_grid
from weft.checkpoint.gguf_names import ARCHITECTURES, ROPE_FACTORS, WRITTEN, rope_factors
from weft.errors import RecipeError, did_you_mean
from weft.kernels.convert import to_float32

if TYPE_CHECKING:
    from weft.packed.form import Packed

PIECE = 1 << 22  # elements in memory at a time
_TABLES = ("rotary_emb.inv_freq", "masked_bias", "position_ids")  # old files hold these; GGUF computes them
_KEPT = ("_norm.weight", "ffn_gate_inp.weight", ROPE_FACTORS)  # of GGUF's names: never quantised, as in llama.cpp


@dataclass
class Output:
    """A tensor of the file: its name there, type and shape, and its bytes in pieces."""

    name: str
    kind: GGMLType
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]


def from_gguf(
    opened: GGUFCheckpoint,
    main: GGMLType,
    outer: GGMLType,
    importance: Mapping[str, np.ndarray],
    notes: list[str],
) -> list[Output]:
    """The tensors of a GGUF file; matrices of another type are encoded anew.

    Args:
        opened: the file.
        main, outer: the type of matrices, and of the embedding and the output head.
        importance: of inputs, by name of the weight.
        notes: what a user should know is added.
    """
    outputs = []
    for name, tensor in opened.items():
        held, source = opened.stored[name]
        quantised = tensor.dtype.floating and len(held.shape) > 1 and not name.endswith(_KEPT)
        kind = _fitting(name, held.shape, main, outer, notes) if quantised else held.kind
        if kind == held.kind:
            outputs.append(Output(name, kind, held.shape, _copied(source, held.offset, held.nbytes)))
        else:
            outputs.append(Output(name, kind, held.shape, _encoded(tensor, kind, name, 0, importance.get(name))))
    return outputs


def from_transformers(
    opened: Checkpoint,
    main: GGMLType,
    outer: GGMLType,
    packed: Mapping[str, Packed],
    importance: Mapping[str, np.ndarray],
    notes: list[str],
) -> tuple[list[Output], int]:
    """The tensors of a transformers model, and how many packed weights are written bit for bit.

    Args:
        opened: the model.
        main, outer: the type of matrices, and of the embedding and the output head.
        packed: weights that are few values already, by name.
        importance: of inputs, by GGUF's name of the weight.
        notes: what a user should know is added.

    Raises:
        RecipeError: a tensor has no place in GGUF, or does not fit config.json.
    """
    config = opened.config
    row = ARCHITECTURES[WRITTEN[config["model_type"]]]
    heads = int(config["num_attention_heads"])
    pairs = int(config.get("num_key_value_heads") or heads)
    strange = sorted(set(packed) - set(opened))
    if strange:
        raise RecipeError(
            f"{opened.name} has no weight {strange[0]!r} that is packed.{did_you_mean(strange[0], opened)}"
        )
    if "lm_head.weight" not in opened and not config.get("tie_word_embeddings"):
        raise RecipeError(
            f"{opened.name}: has no lm_head.weight, and config.json does not say tie_word_embeddings. GGUF would take the "
            "embedding as the head; correct config.json, or add the head."
        )
    outputs, exact, again = [], 0, []
    factors = rope_factors(config)
    if factors is not None:
        outputs.append(Output(ROPE_FACTORS, ggml_type("F32"), factors.shape, _whole(factors.view(np.uint8))))
    for name, tensor in opened.items():
        if name.endswith(_TABLES) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        theirs = row.to_gguf(name)
        if theirs is None or not tensor.dtype.floating:
            raise RecipeError(
                f"{opened.name}: the tensor {name!r} ({tensor.dtype}) has no place in GGUF's {row.name}. Likely cause: an "
                "extra head, a quantised model, or names of another form. Bake or dequantise the model first."
            )
        count = 0
        if row.permuted:
            count = heads if ".attn_q." in theirs else pairs if ".attn_k." in theirs else 0
            if count and (not tensor.shape or tensor.shape[0] % (2 * count)):
                raise RecipeError(
                    f"{name}: the rows of {list(tensor.shape)} do not divide into {count} heads; config.json is of another model."
                )
        if len(tensor.shape) < 2:
            outputs.append(
                Output(theirs, ggml_type("F32"), tensor.shape, _encoded(tensor, ggml_type("F32"), name, count))
            )
            continue
        blocks = _exact(packed[name]) if name in packed else None
        if name in packed and packed[name].shape != tensor.shape:
            raise RecipeError(f"{name}: {list(packed[name].shape)} is packed, the model has {list(tensor.shape)}.")
        if blocks is not None:
            exact += 1
            outputs.append(Output(theirs, blocks[0], tensor.shape, _whole(_paired(blocks[1], count))))
            continue
        kind = _fitting(theirs, tensor.shape, main, outer, notes)
        if name in packed:
            again.append(name)
            outputs.append(Output(theirs, kind, tensor.shape, _dequantized(packed[name], kind, name, count)))
            continue
        outputs.append(Output(theirs, kind, tensor.shape, _encoded(tensor, kind, name, count, importance.get(theirs))))
    if again:
        notes.append(
            f"{len(again)} packed weights, such as {again[0]}, are on no grid of Q4_0 or Q8_0 (groups of a multiple of 32, "
            f"scales of float16, codes around 0) and were rounded again, to {main.name}."
        )
    return outputs, exact


def _fitting(name: str, shape: tuple[int, ...], main: GGMLType, outer: GGMLType, notes: list[str]) -> GGMLType:
    """The type of a matrix; rows that do not divide into blocks become F16, as llama.cpp's converter does."""
    kind = outer if name in ("token_embd.weight", "output.weight") else main
    if shape[-1] % kind.block == 0:
        return kind
    notes.append(f"{name}: rows of {shape[-1]} do not divide into blocks of {kind.block}, so it is F16.")
    return ggml_type("F16")


def _exact(packed: Packed) -> tuple[GGMLType, np.ndarray] | None:
    from weft.packed.gguf import to_blocks  # torch is loaded only for packed weights

    return to_blocks(packed)


def _whole(data: np.ndarray) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: iter([np.ascontiguousarray(data)])


def _copied(source: Any, offset: int, nbytes: int) -> Callable[[], Iterator[np.ndarray]]:
    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, nbytes, 4 * PIECE):
            part = np.empty(min(4 * PIECE, nbytes - start), np.uint8)
            source.read_into(part.data, offset + start)
            yield part

    return pieces


def _encoded(
    tensor: LazyTensor, kind: GGMLType, name: str, heads: int, importance: np.ndarray | None = None
) -> Callable[[], Iterator[np.ndarray]]:
    """The blocks of a tensor, computed piece by piece: whole rows, and whole heads where rows are put in pairs."""
    rows = tensor.shape[0] if tensor.shape else 1
    columns = tensor.size // max(rows, 1)
    last = tensor.shape[-1] if tensor.shape else 1
    if importance is not None and importance.shape != (last,):
        raise RecipeError(f"{name}: the importance has the shape {list(importance.shape)}, the weight {last} inputs.")
    unit = rows // heads if heads else 1
    step = max(1, PIECE // max(unit * columns, 1)) * unit

    def pieces() -> Iterator[np.ndarray]:
        width = tensor.dtype.bits // 8
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = np.empty(count * columns * width, np.uint8)
            tensor.read_into(raw.data, first * columns * width)
            values = to_float32(raw.view(tensor.dtype.numpy), tensor.dtype).reshape(count, -1)
            values = _paired(values, count // unit if heads else 0)
            if kind.name == "Q4_0" and importance is not None:
                blocks = encode_weighted(values.reshape(-1, last), importance, name)
            else:
                blocks = encode_blocks(values.reshape(-1, kind.block), kind, name)
            if kind.name == "Q4_0":
                keep_grid(values.reshape(-1, kind.block), blocks)
            yield blocks

    return pieces


def _dequantized(packed: Packed, kind: GGMLType, name: str, heads: int) -> Callable[[], Iterator[np.ndarray]]:
    def pieces() -> Iterator[np.ndarray]:
        values = _paired(packed.dequantize().cpu().numpy(), heads)
        yield encode_blocks(values.reshape(-1, kind.block), kind, name)

    return pieces


def _paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of whole heads with those that turn together side by side: (heads · d, n) -> (heads · d, n)."""
    if not heads:
        return rows
    return np.ascontiguousarray(rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2)).reshape(rows.shape)
