"""GPTQ's files, which GPTQModel writes and vLLM, SGLang and transformers load.

A layer P with W (out, in), codes from 0 to 2ᵇⁱᵗˢ − 1, side by side from the lowest bits on, also across words:

    qweight int32 (in · bits / 32, out)        the codes of each output, down the inputs
    qzeros  int32 (groups, out · bits / 32)    zero points along the outputs; of the first version each less one
    scales  float16 (groups, out);   g_idx int32 (in,)    the group of each input

    W[o, i] = (code[i, o] − zero[g_idx[i], o]) · scale[g_idx[i], o]

In the first version a zero point of 0 becomes the largest code, which is read back as 0; programs differ in that, so it is
not written. ``g_idx`` that does not rise (desc_act) is read as a permutation of groups.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.errors import CheckpointError
from weft.packed.around import Permuted, within
from weft.packed.bits import WORD, pack_bits, unpack_bits
from weft.packed.form import Packed
from weft.packed.formats.format import (
    DAMAGED,
    Format,
    Get,
    Shapes,
    check_groups,
    expect,
    number,
    optional,
    required,
    shape_of,
)
from weft.packed.formats.grids import by_group, is_symmetric, not_whole, unsigned
from weft.packed.forms import Affine

BITS = (2, 3, 4, 8)


class GPTQ(Format):
    """The first version, whose zero points are stored less one."""

    name: ClassVar[str] = "gptq"
    method: ClassVar[str] = "gptq"
    checkpoint_format: ClassVar[str] = "gptq"
    marks: ClassVar[tuple[str, ...]] = (".qweight",)
    parts: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales", ".g_idx")

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return torch.float16

    def refuses(self, packed: Packed) -> str:
        inner = within(packed, Permuted)
        if not isinstance(inner, Affine) or inner.bits not in BITS:
            return f"it holds grids of 2, 3, 4 or 8 bits, not {inner.form}. Take weft."
        for axis, size in zip(("outputs", "inputs"), inner.shape):
            if size * inner.bits % WORD:
                return f"{size} {axis} of {inner.bits} bits do not fill whole words. Take pack-quantized."
        why = not_whole(inner)
        if not why and self.checkpoint_format == "gptq" and not unsigned(inner)[1].all():
            return "programs differ in how they read a zero point of 0 in its first version. Take gptq_v2."
        return why

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        inner = within(packed, Permuted)
        assert isinstance(inner, Affine)
        codes, zero = unsigned(inner)
        group = torch.arange(inner.shape[1], device=codes.device) // inner.group_size
        if isinstance(packed, Permuted):
            order = packed.order.long()
            codes, group = (
                torch.empty_like(codes).index_copy_(1, order, codes),
                torch.empty_like(group).scatter_(0, order, group),
            )
        stored = zero - 1 if self.checkpoint_format == "gptq" else zero
        return {
            "qweight": pack_bits(codes, inner.bits).T,
            "qzeros": pack_bits(stored.T, inner.bits),
            "scales": inner.scale.T,
            "g_idx": group.to(torch.int32),
        }

    def config(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, Any]:
        facts = {name: _facts(packed) for name, packed in layers.items()}
        (bits, size, order), _ = Counter((b, g, o) for b, g, o, _ in facts.values()).most_common(1)[0]
        apart: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in ignored}
        for name, (b, g, o, _) in facts.items():
            if (b, g, o) != (bits, size, order):
                apart[f"+:^{re.escape(name)}$"] = {"bits": b, "group_size": g, "desc_act": o}
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            "bits": bits,
            "group_size": size,
            "desc_act": order,
            "sym": all(s for *_, s in facts.values()),
            "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in layers),
            "pack_dtype": "int32",
            **({"dynamic": apart} if apart else {}),
        }

    def files(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": self.config(layers, ignored)}

    def detects(self, config: Mapping[str, Any]) -> bool:
        return super().detects(config) and config.get("checkpoint_format", "gptq") == self.checkpoint_format

    def shape(self, name: str, shapes: Shapes, get: Get, config: Mapping[str, Any]) -> tuple[int, ...]:
        words, out = shape_of(shapes, f"{name}.qweight", 2)
        groups = shape_of(shapes, f"{name}.scales", 2)[0]
        if f"{name}.g_idx" in shapes:
            columns = shape_of(shapes, f"{name}.g_idx", 1)[0]
        else:
            columns = words * WORD // max(1, number(config, "bits"))
        bits = words * WORD // max(1, columns)
        expected = {"qzeros": (groups, out * bits // WORD), "scales": (groups, out)}
        shape_of(shapes, f"{name}.qzeros", 2)
        wrong = [part for part, shape in expected.items() if shapes[f"{name}.{part}"] != shape]
        if columns < 1 or bits not in BITS or columns * bits != words * WORD or out * bits % WORD or wrong:
            part = wrong[0] if wrong else "qweight"
            raise CheckpointError(
                f"{name}.{part} is {list(shapes[f'{name}.{part}'])}, which does not fit {columns} inputs and {out} outputs of "
                f"{bits} bits. {DAMAGED}"
            )
        return out, columns

    def read(self, name: str, get: Get, config: Mapping[str, Any]) -> Packed:
        words, zeros = (
            expect(f"{name}.{p}", required(get, f"{name}.{p}"), None, torch.int32) for p in ("qweight", "qzeros")
        )
        scales = expect(f"{name}.scales", required(get, f"{name}.scales"), None)
        index = optional(get, f"{name}.g_idx")
        found = {"qweight": words, "qzeros": zeros, "scales": scales, **({} if index is None else {"g_idx": index})}
        shapes = {f"{name}.{part}": tuple(t.shape) for part, t in found.items()}
        out, columns = self.shape(name, shapes, get, config)
        bits, groups = words.shape[0] * WORD // columns, len(scales)
        codes = unpack_bits(words.T.contiguous(), bits, columns)
        zero = unpack_bits(zeros, bits, out).long()
        if self.checkpoint_format == "gptq":
            zero = zero + 1 & (1 << bits) - 1
        if index is None:
            size = number(config, "group_size")
            index = torch.arange(columns) // (size if size > 0 else columns)
        group = check_groups(f"{name}.g_idx", index, columns, groups)
        scale = scales.T.contiguous()
        return by_group(codes, scale, zero.T.to(scale.dtype), group, bits)


class GPTQ2(GPTQ):
    """The second version, whose zero points are stored as they are."""

    name: ClassVar[str] = "gptq_v2"
    checkpoint_format: ClassVar[str] = "gptq_v2"


def _facts(packed: Packed) -> tuple[int, int, bool, bool]:
    """Bits, group size (−1: the row), whether inputs are permuted, whether zero points are the middle."""
    inner = within(packed, Permuted)
    assert isinstance(inner, Affine)
    size = -1 if inner.scale.shape[1] == 1 else inner.group_size
    return inner.bits, size, isinstance(packed, Permuted), is_symmetric(inner)
