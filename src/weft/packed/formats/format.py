"""What a format of files is: how the tensors of a packed layer are named and laid out, and what config.json says.

    why = form.refuses(packed)                              # "" where the format can say this packed weight
    tensors = form.write("model.layers.0.mlp.up_proj", form.fit(packed, torch.bfloat16), torch.bfloat16)
    settings = form.config(layers, ignored)                 # the quantization_config of config.json
    packed = form.read("model.layers.0.mlp.up_proj", get, settings)

A layer's name P is that of its module: the plain weight would be ``P.weight``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.errors import CheckpointError, RecipeError
from weft.packed.form import Packed
from weft.packed.formats.grids import round_scales, same_scales

Get = Callable[[str], Tensor]
Shapes = Mapping[str, tuple[int, ...]]
DAMAGED = "The file is damaged, or of another kind than its config.json says; fetch both again."


class Format(ABC):
    """A format; subclasses say which.

    Attributes:
        name: what a user calls it.
        method: the ``quant_method`` of its configuration.
        marks: endings of tensor names; a layer P is where ``P`` + one of them is.
        parts: endings of all tensors of a layer.
    """

    name: ClassVar[str] = ""
    method: ClassVar[str] = ""
    marks: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def refuses(self, packed: Packed) -> str:
        """Why this format cannot say a packed weight, and what to do; empty where it can."""

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """The type of scales in files of a model of type ``dtype``; None: as they are."""
        return None

    def fit(self, packed: Packed, dtype: torch.dtype) -> Packed:
        """A packed weight with its scales rounded to the type that files have."""
        kind = self.scale_dtype(dtype)
        return packed if kind is None else round_scales(packed, kind)

    def write(self, name: str, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a layer, by their full names.

        Args:
            name: the layer P.
            packed: what :meth:`refuses` does not refuse, and :meth:`fit` does not change.
            dtype: of the model.

        Raises:
            RecipeError: the format cannot say it, or not without rounding scales.
        """
        why = self.refuses(packed)
        if why:
            raise RecipeError(f"{name} cannot be written as {self.name}: {why}")
        fitted = self.fit(packed, dtype)
        if not same_scales(packed, fitted):
            raise RecipeError(
                f"{name} cannot be written as {self.name} without rounding its scales to {self.scale_dtype(dtype)}. "
                "Round them with the format's fit before codes are chosen, or after."
            )
        made = self._write(fitted, dtype)
        return {f"{name}.{part}": tensor.contiguous() for part, tensor in made.items()}

    def _write(self, packed: Packed, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors by their endings. Not abstract: a format that is only read refuses everything, and has none."""
        raise NotImplementedError

    @abstractmethod
    def config(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of a model's config.json.

        Args:
            layers: all packed layers.
            ignored: linear layers that are not packed.
        """

    def files(self, layers: Mapping[str, Packed], ignored: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Further JSON files beside config.json, by name."""
        return {}

    def detects(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``quantization_config`` is of this format."""
        return str(config.get("quant_method", "")).lower() == self.method

    def check(self, config: Mapping[str, Any]) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise ``CheckpointError`` if a configuration asks for what weft does not read."""

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
        """Packed layers among a file's tensors: P -> the names of its tensors."""
        names = list(names)
        known, made = set(names), {}
        for name in names:
            for mark in self.marks:
                if name.endswith(mark):
                    layer = name.removesuffix(mark)
                    made[layer] = [layer + part for part in self.parts if layer + part in known]
        return made

    def plain_name(self, name: str) -> str:
        """The tensor that a layer stands for."""
        return f"{name}.weight"

    def plain(self, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A dequantised matrix in the plain tensor's shape."""
        return weight

    @abstractmethod
    def shape(self, name: str, shapes: Shapes, get: Get, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of the plain tensor, from the shapes of the packed ones and little else."""

    @abstractmethod
    def read(self, name: str, get: Get, config: Mapping[str, Any]) -> Packed:
        """The packed weight of a layer.

        Args:
            name: the layer P.
            get: gives a tensor by its full name, raises KeyError where there is none.
            config: the ``quantization_config``.

        Raises:
            CheckpointError: tensors are missing or do not fit together.
        """


def optional(get: Get, name: str) -> Tensor | None:
    """A tensor, or None where there is none."""
    try:
        return get(name)
    except KeyError:
        return None


def required(get: Get, name: str) -> Tensor:
    """A tensor that a layer cannot be read without."""
    tensor = optional(get, name)
    if tensor is None:
        raise CheckpointError(f"{name} is missing, and the layer cannot be read without it. {DAMAGED}")
    return tensor


def shape_of(shapes: Shapes, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor that must have so many axes."""
    if name not in shapes:
        raise CheckpointError(f"{name} is missing, and the layer cannot be read without it. {DAMAGED}")
    if len(shapes[name]) != dims or 0 in shapes[name]:
        raise CheckpointError(f"{name} has {dims} axes in this format, got {list(shapes[name])}. {DAMAGED}")
    return shapes[name]


def expect(name: str, tensor: Tensor, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> Tensor:
    """A tensor that has the shape and one of the types; without types, any floating-point one."""
    if shape is not None and tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} is {list(shape)} in this format, got {list(tensor.shape)}. {DAMAGED}")
    if tensor.dtype not in dtypes if dtypes else not tensor.is_floating_point():
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes) or "floating point"
        raise CheckpointError(f"{name} is {kinds} in this format, got {str(tensor.dtype)[6:]}. {DAMAGED}")
    return tensor


def number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of a configuration."""
    value = config.get(key, default)
    if type(value) is not int:
        raise CheckpointError(f"The quantization_config's {key} is a whole number, got {value!r}. Repair config.json.")
    return value


def check_groups(name: str, index: Tensor, columns: int, groups: int) -> Tensor:
    """The group of each column, as indices."""
    expect(name, index, (columns,), torch.int32, torch.int64)
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise CheckpointError(
            f"{name} has groups {int(index.min())} to {int(index.max())}, and there are scales of {groups}. {DAMAGED}"
        )
    return index.long()
