"""Packed layers in the files of a model: which format says them, and what a block's part holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate.parts import Part
from weft.calibrate.task import BlockTask, as_stored
from weft.calibrate.walker import Block
from weft.packed import Packed, unpack
from weft.packed.formats.format import Format
from weft.packed.outline import describe, outline
from weft.packed.rows import some_rows

OUTLINE, DENSE, WEIGHT = "outline", "dense", ".weight"


@dataclass
class PackedFiles:
    """Writes packed weights in a format; layers that it cannot say keep their type, with the quantised values.

    Attributes:
        form: the format.
        dtype: of the model.
        strict: refuse what the format cannot say, instead of keeping its type.
    """

    form: Format
    dtype: torch.dtype
    strict: bool = True
    linears: list[str] = field(default_factory=list)

    def round(self, packed: Packed) -> Packed:
        """A packed weight as the files will have it."""
        return self.form.fit(packed, self.dtype)

    def block(self, block: Block, tasks: list[BlockTask]) -> Part:
        """Packed tensors that take the place of a block's matrices."""
        packed = {name: one for task in tasks for name, one in task.packed.items()}
        layers = {name: layer for task in tasks for name, layer in task.layers.items() if name in packed}
        source = block.walk.source
        notes = {name: task.notes.setdefault(name, {}) for task in tasks for name in task.packed}
        return self.part(layers, packed, source.stored_names(block.name, layers), notes)

    def part(
        self,
        layers: Mapping[str, nn.Module],
        packed: Mapping[str, Packed],
        stored: Mapping[str, Mapping[str, tuple[int, int]]],
        notes: dict[str, dict[str, Any]],
    ) -> Part:
        """Packed layers as tensors of files.

        Args:
            layers: by full name.
            packed: (out, in) of each.
            stored: under which names the checkpoint holds each, and which rows.
            notes: of the layers, to which is added how they are written.
        """
        part = Part()
        for name, one in packed.items():
            made: dict[str, dict[str, Tensor]] = {}
            outlines = {}
            for place, (start, stop) in stored.get(name, {}).items():
                rows = one if (start, stop) == (0, one.shape[0]) else _rows(one, start, stop)
                if rows is None or not place.endswith(WEIGHT):
                    break
                final = as_stored(layers[name], rows)
                prefix = place.removesuffix(WEIGHT)
                if self.form.refuses(final) and not self.strict:
                    break
                made[place] = self.form.write(prefix, final, self.dtype)
                outlines[prefix] = describe(final)
            if not made or len(made) != len(stored.get(name, {})):
                notes[name][DENSE] = "its matrix has no tensor of its own in files of this format"
                continue
            for place, tensors in made.items():
                part.tensors |= tensors
                part.replaces[place] = list(tensors)
            notes[name][OUTLINE] = outlines
        return part

    def finish(self, config: dict[str, Any], report: dict[str, Any]) -> dict[str, str]:
        """Put the ``quantization_config`` into a configuration, and give further files."""
        outlines = {p: outline(d) for notes in report.values() for p, d in notes.pop(OUTLINE, {}).items()}
        if not outlines:
            return {}
        ignored = [name for name in self.linears if name not in outlines]
        config["quantization_config"] = self.form.config(outlines, ignored)
        files = self.form.files(outlines, ignored)
        return {name: json.dumps(value, indent=2) + "\n" for name, value in files.items()}


def _rows(packed: Packed, start: int, stop: int) -> Packed | None:
    part = packed.part(start, stop)
    if part is not None:
        return part
    # rows that cannot be had apart bit for bit as the whole gives them, as those of a low-rank sum: packed and sliced
    found = some_rows(packed.tensors(), packed.settings(), slice(start, stop))
    return None if found is None else unpack(*found)
