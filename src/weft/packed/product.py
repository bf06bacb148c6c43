"""Inputs times a packed matrix: which way is taken, and the operators that torch.compile sees.

==========  ================================  ======================  ================================================
way         matrices                          inputs                  computes
==========  ================================  ======================  ================================================
dequantize  all                               all                     blocks of rows in float32, in the inputs' type
int4        grids of up to 4 bits             bfloat16, small batch   torch's int4 operator
int8        grids of 5 to 8 bits, one scale   bfloat16, small batch   torch's int8 operator
            a row, codes − zero in −128 … 127
integer     grids of up to 8 bits, one scale  quantised to int8       integers, exactly; then the scales
            a row, whole zeros
triton      grids, tables; on a GPU           small batch             codes unpacked in registers
==========  ================================  ======================  ================================================

The first is the reference. ``int4``, ``int8`` and ``integer`` multiply by a copy of the codes in an order of this
machine's own, made when it is first needed and held against the reference then: where that fails, there is a warning, and
the reference is used. Batches larger than ``LARGEST`` are faster with the reference (``benchmarks/quantized_linear.py``).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weft.kernels import torch_int4, torch_int8
from weft.packed.bits import unpack_bits
from weft.packed.levels import quantize_inputs
from weft.packed.rows import dequantize, inside, some_rows

WAYS = ("auto", "dequantize", "int4", "int8", "integer", "triton")
LARGEST = {"int4": 48, "int8": 24}  # rows of inputs up to which a way beats the reference
LARGEST_ON_GPU = 64  # beyond, a product is bound by arithmetic, and a dense one is faster
BLOCK = 1 << 20  # weights that are unpacked at once: they stay in a cache
BLOCK_ON_GPU = 1 << 25
REPACKED = 1 << 24  # weights that are put into another order at once
ALIGNED = 256  # and rows in multiples of this, which the int4 operator keeps together in blocks of up to 64
# Of the norm. Rounding scales and inputs to bfloat16 costs about 2⁻⁸, a wrong order of codes about 1.
TOLERANCE = 1 / 64
_WARNED: set[str] = set()


def ways(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The ways to multiply by a packed matrix on a CPU, the best first; "dequantize" is the last.

    >>> from weft.packed import Affine
    >>> made = Affine(torch.ones(1, 2, dtype=torch.int16), torch.ones(1, 1), torch.zeros(1, 1), 4, 0)
    >>> ways(made.tensors(), made.settings())
    ('int4', 'dequantize')
    """
    form = settings["form"]
    if any(t.is_meta for t in tensors.values()):
        return ("dequantize",)
    if form in ("low-rank", "activations"):
        inner = ways(*inside(tensors, settings))
        rows = form == "activations" and settings["kind"] == "int8" and not settings.get("group_size")  # one scale each
        whole = rows and _integers(*inside(tensors, settings))
        return ("integer", *inner) if whole else inner
    found: list[str] = []
    if form == "affine":
        bits, columns, groups = int(settings["bits"]), int(settings["columns"]), tensors["scale"].shape[1]
        if bits <= 4 and torch_int4.kernel_group(columns, groups):
            found.append("int4")
        elif 4 < bits <= 8 and groups == 1 and _in_int8(tensors, settings):
            found.append("int8")
    return (*found, "dequantize")


def prepare(way: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], shape: Sequence[int]) -> list[Tensor]:
    """What a way multiplies by, checked against the reference on some rows.

    Returns:
        Tensors; none, after a warning, if the way is wrong here.
    """
    try:
        ready = _ready(way, tensors, settings)
        error = _error(way, ready, tensors, settings, shape)
    except (RuntimeError, NotImplementedError) as problem:  # this build of torch does not have the operator
        ready, why = [], str(problem).splitlines()[0]
    else:
        if error <= TOLERANCE:
            return ready
        why = f"relative error {error:.3g}"
    if way not in _WARNED:
        _WARNED.add(way)
        warnings.warn(
            f"Products by the way {way!r} are wrong on this machine or for these weights ({why}); such layers unpack "
            "their weights instead.",
            RuntimeWarning,
            stacklevel=2,
        )
    return []


@torch.library.custom_op("weft::packed_linear", mutates_args=())
def packed_linear(x: Tensor, tensors: list[Tensor], ready: list[Tensor], facts: str) -> Tensor:
    """x (…, in) -> (…, out) of the same type; ``facts`` is JSON: names of the tensors, settings, shape, way, dtype."""
    known = _facts(facts)
    rows = x.reshape(-1, known["shape"][1])
    dtype = _computed_in(x, known)
    if not len(rows):
        return x.new_empty((*x.shape[:-1], known["shape"][0]))
    named = dict(zip(known["names"], tensors))
    small = len(rows) <= known["largest"]
    way = known["way"] if small else "dequantize"
    y = _times(rows.to(dtype), named, known["settings"], ready if small else [], way)
    return y.to(x.dtype).reshape(*x.shape[:-1], known["shape"][0]).contiguous()


@packed_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], ready: list[Tensor], facts: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], _facts(facts)["shape"][0]))


@torch.library.custom_op("weft::packed_linear_backward", mutates_args=())
def packed_linear_backward(gradient: Tensor, tensors: list[Tensor], facts: str) -> Tensor:
    """(…, out) -> (…, in): the gradient by the inputs; as if these had not been quantised."""
    known = _facts(facts)
    out, columns = known["shape"]
    rows = gradient.reshape(-1, out)
    if not len(rows):
        return gradient.new_empty((*gradient.shape[:-1], columns))
    named = dict(zip(known["names"], tensors))
    made = _back(rows.to(_computed_in(gradient, known)), named, known["settings"], out)
    return made.to(gradient.dtype).reshape(*gradient.shape[:-1], columns).contiguous()


@packed_linear_backward.register_fake
def _(gradient: Tensor, tensors: list[Tensor], facts: str) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], _facts(facts)["shape"][1]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])
    ctx.facts, ctx.ready = inputs[3], len(inputs[2])


def _by_inputs(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    return packed_linear_backward(gradient, tensors, ctx.facts), [None] * len(tensors), [None] * ctx.ready, None


packed_linear.register_autograd(_by_inputs, setup_context=_remember)


@torch.library.custom_op("weft::packed_rows", mutates_args=())
def packed_rows(index: Tensor, tensors: list[Tensor], dtype: torch.dtype, facts: str) -> Tensor:
    """Rows of a packed matrix: (…) integers -> (…, columns)."""
    known = _facts(facts)
    rows, columns = known["shape"]
    flat = index.reshape(-1).long()
    if not len(flat):
        return torch.empty((*index.shape, columns), dtype=dtype, device=index.device)
    if not index.is_cuda and not 0 <= int(flat.min()) <= int(flat.max()) < rows:
        raise IndexError(f"Rows are 0 to {rows - 1}, got {int(flat.min())} to {int(flat.max())}.")
    made = dequantize(dict(zip(known["names"], tensors)), known["settings"], flat)
    return made.to(dtype).reshape(*index.shape, columns)


@packed_rows.register_fake
def _(index: Tensor, tensors: list[Tensor], dtype: torch.dtype, facts: str) -> Tensor:
    return torch.empty((*index.shape, _facts(facts)["shape"][1]), dtype=dtype, device=index.device)


def facts_of(
    names: Sequence[str], settings: Mapping[str, Any], shape: Sequence[int], way: str, largest: int, dtype: str
) -> str:
    """What the operators take as ``facts``."""
    made = {
        "names": list(names), "settings": dict(settings), "shape": list(shape), "way": way, "largest": largest, "dtype": dtype,
    }  # fmt: skip
    return json.dumps(made, sort_keys=True)


@cache
def _facts(text: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(text)
    return made


def _computed_in(x: Tensor, known: Mapping[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, known["dtype"]) if known["dtype"] else x.dtype
    if dtype == torch.float16 and x.device.type == "cpu":
        return torch.float32  # exact for these, and several times faster than products in float16
    return dtype


def _times(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], ready: list[Tensor], way: str
) -> Tensor:
    """x (batch, in) -> (batch, out)."""
    form = settings["form"]
    if form == "activations":
        scale = tensors.get("input_scale")
        if ready and way == "integer":
            return _integer_product(x, ready, scale)
        x = quantize_inputs(x, settings["kind"], scale, int(settings.get("group_size", 0)))
        return _times(x, *inside(tensors, settings), ready, way)
    if form == "low-rank":
        thin = functional.linear(functional.linear(x, tensors["right"].to(x.dtype)), tensors["left"].to(x.dtype))
        return _times(x, *inside(tensors, settings), ready, way).to(x.dtype) + thin
    if ready and way == "int4":
        return torch_int4.multiply(x, ready, len(tensors["codes"]))
    if ready and way == "int8":
        return torch_int8.multiply(x, ready)
    if x.is_cuda and way != "dequantize":
        y = _on_gpu(x, tensors, settings)
        if y is not None:
            return y
    blocks = _blocks(tensors, settings, x)
    if len(blocks) == 1:
        return functional.linear(x, dequantize(tensors, settings).to(x.dtype))
    y = x.new_empty(len(x), blocks[-1].stop)
    for rows, weight in _unpacked(tensors, settings, blocks, x):
        y[:, rows] = functional.linear(x, weight)
    return y


def _back(gradient: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], out: int) -> Tensor:
    """(batch, out) -> (batch, in)."""
    form = settings["form"]
    if form == "activations":
        return _back(gradient, *inside(tensors, settings), out)
    if form == "low-rank":
        left, right = tensors["left"].to(gradient.dtype), tensors["right"].to(gradient.dtype)
        return _back(gradient, *inside(tensors, settings), out) + gradient @ left @ right
    blocks = _blocks(tensors, settings, gradient)
    if len(blocks) == 1:
        return gradient @ dequantize(tensors, settings).to(gradient.dtype)
    total: Any = 0
    for rows, weight in _unpacked(tensors, settings, blocks, gradient):  # added up in at least float32
        part = gradient[:, rows] @ weight
        total = total + part.to(torch.promote_types(part.dtype, torch.float32))
    assert isinstance(total, Tensor)
    return total


def _unpacked(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], blocks: list[slice], x: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the matrix in the type of ``x``, each block in the memory of the one before it: fresh memory costs more."""
    shape = (blocks[0].stop, int(settings["columns"]))
    room = torch.empty(shape, device=x.device)
    narrow = room if x.dtype == room.dtype else x.new_empty(shape)
    for rows in blocks:
        count = rows.stop - rows.start
        made = dequantize(tensors, settings, rows, room[:count])
        yield rows, made if made.dtype == x.dtype else narrow[:count].copy_(made)


def _blocks(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], x: Tensor) -> list[slice]:
    """Rows to unpack at once; all of them where rows do not stand for themselves."""
    first = next(t for name, t in tensors.items() if name.rpartition("_")[0] != "codebook" and t.dim() > 1)
    rows = first.shape[1] if settings["form"] == "binary" else len(first)
    if settings["form"] == "transposed" or not rows:
        return [slice(0, rows)]
    step = max((BLOCK_ON_GPU if x.is_cuda else BLOCK) // max(int(settings["columns"]), 1), 1)
    if rows <= step or some_rows(tensors, settings, slice(0, 1)) is None:
        return [slice(0, rows)]
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _on_gpu(x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor | None:
    """The product by a kernel of Triton, or None where there is none for it."""
    from weft.kernels import triton_ready

    if len(x) > LARGEST_ON_GPU or not triton_ready():
        return None
    if settings["form"] == "affine" and int(settings["bits"]) <= 4:
        from weft.kernels.triton_packed import affine_linear

        zero, low = tensors.get("zero"), int(settings["low"])
        if zero is None:
            zero = torch.full_like(tensors["scale"], -low)
        elif zero.dtype != torch.uint8:
            zero = zero.float() - low
        return affine_linear(x, tensors["codes"], tensors["scale"], zero, int(settings["bits"]))
    if settings["form"] == "lookup" and "table" not in tensors and "nested_scale" not in tensors:
        from weft.kernels.triton_packed import lookup_linear

        levels, columns, size = tensors["levels"], int(settings["columns"]), int(settings["block_size"])
        bits = max(1, (levels.shape[1] - 1).bit_length())
        if bits <= 4 and columns % size == 0:
            return lookup_linear(x, tensors["codes"], levels[0], tensors["scale"].view(-1, columns // size), bits)
    return None


def _integer_product(x: Tensor, ready: list[Tensor], static: Tensor | None) -> Tensor:
    """x (batch, in), quantised to int8, times integers: exact but for the scales."""
    codes, weight_scale, offset = ready
    wide = x.float()
    if static is None:
        scale = (wide.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.where(scale.isfinite(), scale, torch.nan)
    else:  # integers have no NaN: the row's scale is it
        scale = torch.where(wide.isnan().any(1, keepdim=True), torch.nan, static.float())
    steps = (wide / scale).round().clamp(-128, 127).nan_to_num(0.0).to(torch.int8)
    made = torch_int8.multiply_integers(steps, codes, offset)
    return (made.float() * scale * weight_scale).to(torch.promote_types(x.dtype, torch.float32))


def _ready(way: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> list[Tensor]:
    """What a way multiplies by, made from some rows at a time, so that little memory is needed beside it."""
    while settings["form"] in ("low-rank", "activations"):
        tensors, settings = inside(tensors, settings)
    rows, step = len(tensors["codes"]), max(REPACKED // max(int(settings["columns"]), 1) // ALIGNED, 1) * ALIGNED
    parts = []
    for start in range(0, rows, step):
        part = some_rows(tensors, settings, slice(start, min(start + step, rows)))
        assert part is not None  # rows of a grid stand for themselves
        parts.append(_ready_rows(way, *part))
    if len(parts) == 1:
        return parts[0]
    if way == "int4":  # scales are (groups, out, 2)
        return [torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], dim=1)]
    return [torch.cat(several) for several in zip(*parts)]


def _ready_rows(way: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> list[Tensor]:
    bits, low = int(settings["bits"]), int(settings["low"])
    codes = unpack_bits(tensors["codes"].contiguous(), bits, int(settings["columns"]))  # from 0
    zero = _zero(tensors, settings) - low
    if way == "int4":
        return torch_int4.prepare(codes, tensors["scale"], zero, bits)
    if way == "int8":
        return torch_int8.prepare((codes - zero).to(torch.int8), tensors["scale"])
    middle = 1 << (bits - 1)
    offset = (zero - middle).flatten().to(torch.int32)
    return [(codes.to(torch.int16) - middle).to(torch.int8), tensors["scale"].float().flatten(), offset]


def _error(
    way: str, ready: list[Tensor], tensors: Mapping[str, Tensor], settings: Mapping[str, Any], shape: Sequence[int]
) -> float:
    """Relative error on a few inputs, and on first, last and some other outputs."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, shape[1], generator=draw).to(torch.bfloat16).float()
    rows = torch.cat([torch.arange(min(32, shape[0])), torch.randint(shape[0], (32,), generator=draw)])
    rows = torch.cat([rows, shape[0] - 1 - rows[:32]])
    made = _times(x, tensors, settings, ready, way)[:, rows].double()
    seen = x
    while settings["form"] in ("low-rank", "activations"):  # the low-rank part is added by all ways alike
        if settings["form"] == "activations":
            seen = quantize_inputs(
                seen, settings["kind"], tensors.get("input_scale"), int(settings.get("group_size", 0))
            )
        else:
            low_rank = tensors["left"].double() @ (tensors["right"].double() @ seen.double().T)
            made = made - low_rank.T[:, rows]
        tensors, settings = inside(tensors, settings)
    expected = seen.double() @ dequantize(tensors, settings, rows).double().T
    return float((made - expected).norm() / expected.norm().clamp(min=1e-30))


def _zero(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    zero = tensors.get("zero")
    if zero is None:
        return torch.zeros_like(tensors["scale"], dtype=torch.float32)
    return zero.float() + int(settings["low"]) if zero.dtype == torch.uint8 else zero.float()


def _integers(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Whether a product with integers is exact: one scale a row, whole zeros, no overflow."""
    if settings["form"] != "affine" or int(settings["bits"]) > 8 or tensors["scale"].shape[1] != 1:
        return False
    zero = _zero(tensors, settings)
    whole = bool((zero == zero.round()).all()) and bool((zero.abs() <= 255).all())
    return whole and int(settings["columns"]) <= torch_int8.MOST_INPUTS


def _in_int8(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    zero, low = _zero(tensors, settings), int(settings["low"])
    high = low + (1 << int(settings["bits"])) - 1
    return bool(((zero == zero.round()) & (low - zero >= -128) & (high - zero <= 127)).all())
