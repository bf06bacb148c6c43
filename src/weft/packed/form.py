"""What a packed weight is: few numbers that stand for a matrix (out, in).

    values = packed.dequantize()                             # (out, in) float32
    tensors, settings = packed.tensors(), packed.settings()  # what a file holds: few bits, and facts in JSON
    same = unpack(tensors, settings)

In memory the codes of a form are plain integers, one in an element; :meth:`Packed.tensors` packs them. Forms nest: a matrix
that was quantised along its outputs is :class:`~weft.packed.around.Transposed` of one quantised along its inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from weft.errors import CheckpointError, did_you_mean

FORMS: dict[str, type[Packed]] = {}


@dataclass(frozen=True, eq=False)
class Packed(ABC):
    """A matrix of few values; subclasses say which.

    Attributes:
        form: its name in files.
    """

    form: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        if cls.form:
            FORMS[cls.form] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The matrix (out, in), float32: exactly what every other way to multiply by it stands for."""

    def part(self, first: int, last: int) -> Packed | None:
        """The rows from ``first`` to before ``last`` as a packed weight; None where they cannot be had apart."""
        return None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by name; names have no dots."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Facts that JSON can say; ``form`` is among them."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """The form of its own :meth:`tensors` and :meth:`settings`."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in a file."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of its tensors for each element of the matrix, scales included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def to(self, device: Any) -> Self:
        """The same on another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Packed):
                moved[field.name] = value.to(device)
            elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                moved[field.name] = tuple(v.to(device) for v in value)
        return replace(self, **moved)


def unpack(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Packed:
    """The packed weight of a file's tensors and facts.

    Raises:
        CheckpointError: the form is not known, a tensor or a fact is missing, or they do not fit together.
    """
    import weft.packed  # noqa: F401  every form is known then

    form = str(settings.get("form", ""))
    if form not in FORMS:
        raise CheckpointError(f"There is no packed form {form!r}.{did_you_mean(form, FORMS)} A newer weft may know it.")
    try:
        return FORMS[form].from_tensors(tensors, settings)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"A packed weight of the form {form!r} is damaged or incomplete: {error!r}.") from None
