"""A model's weights on disk as a mapping from names to lazy tensors.

Opening reads headers only. A :class:`LazyTensor` knows its shape, dtype and size, and reads its bytes
when asked. Names that share one storage (tied weights) are listed in :attr:`Checkpoint.aliases`, so
that each storage is transformed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.checkpoint.dtypes import DType
from weft.checkpoint.files import ByteSource
from weft.checkpoint.header import TensorInfo
from weft.errors import MissingTensorError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import torch

    from weft.packed.form import Packed


@dataclass(frozen=True)
class LazyTensor:
    """One tensor in a file: described by ``info``, read on demand from ``source``.

    ``stored`` is the type that it would have in a file, where ``source`` computes it in float32 (an adapted or merged
    tensor).
    """

    info: TensorInfo
    source: ByteSource
    stored: DType | None = None

    @property
    def name(self) -> str:
        """Full name."""
        return self.info.name

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.info.dtype

    @property
    def natural_dtype(self) -> DType:
        """The type to write it in unless the user chooses another."""
        return self.stored or self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.info.shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.info.nbytes

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.info.size

    def read_into(self, buffer: memoryview, start: int = 0) -> None:
        """Fill ``buffer`` with the tensor's bytes from byte ``start`` on."""
        self.source.read_into(buffer, self.info.offset + start)

    def bits(self) -> np.ndarray:
        """The elements as stored, in the numpy type that holds their bits (bfloat16 as uint16)."""
        import numpy as np

        raw = np.empty(self.nbytes, np.uint8)
        self.read_into(raw.data)
        array = raw.view(self.dtype.numpy)
        return array.reshape(self.shape) if self.dtype.bits >= 8 else array

    def numpy(self) -> np.ndarray:
        """The values as a numpy array; types that numpy lacks (bfloat16, float8) come as float32."""
        if self.dtype.floating and self.dtype.name not in ("F64", "F32", "F16"):
            from weft.kernels.convert import to_float32

            return to_float32(self.bits(), self.dtype)
        return self.bits()

    def torch(self) -> torch.Tensor:
        """The values as a torch tensor of the stored dtype; types that torch lacks come as raw bytes."""
        import torch

        array = self.bits()
        if not self.dtype.torch:
            return torch.from_numpy(array)
        # view through the raw bytes: numpy has no bfloat16, and torch cannot view a 0-d tensor as another type
        flat = torch.from_numpy(array.reshape(-1)) if array.size else torch.empty(0, dtype=torch.uint8)
        shape = self.shape
        if self.dtype.bits < 8:  # torch counts pairs, a checkpoint counts elements
            if not shape or shape[-1] % 2:
                return flat
            shape = (*shape[:-1], shape[-1] // 2)
        return flat.view(getattr(torch, self.dtype.torch)).reshape(shape)

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.dtype.name}, {list(self.shape)}, {self.nbytes:,} bytes)"


@dataclass
class Checkpoint(Mapping[str, LazyTensor]):
    """An ordered map from names to lazy tensors, with the files beside them.

    Use it as a context manager, or call :meth:`close`.

    Attributes:
        name: how to call it in a report: a folder's or file's own name, or a Hub id; never a whole path.
        tensors: all tensors, tied ones included.
        aliases: name of a tied tensor -> name of the tensor whose storage it shares.
        config: the model's ``config.json``, empty if there is none.
        metadata: string metadata of the files.
        folder: where companion files (tokenizer, generation config) lie, if anywhere on this machine.
        fingerprint: changes when the files change; decides whether an interrupted run may resume.
        packed: of a quantised model, layer -> a function that reads its packed weight; ``tensors`` has the plain ones.
    """

    name: str
    tensors: dict[str, LazyTensor]
    aliases: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    fingerprint: str = ""
    packed: dict[str, Callable[[], Packed]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return self.tensors[name]
        except KeyError:
            hint = did_you_mean(name, self.tensors)
            raise MissingTensorError(
                f"{self.name} has no tensor {name!r} among its {len(self.tensors)}.{hint}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all distinct tensors."""
        return sum(t.nbytes for name, t in self.tensors.items() if name not in self.aliases)

    @property
    def parameters(self) -> int:
        """Elements of all distinct tensors."""
        return sum(t.size for name, t in self.tensors.items() if name not in self.aliases)

    def close(self) -> None:
        """Release all files."""
        for source in {id(t.source): t.source for t in self.tensors.values()}.values():
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self)} tensors, {self.parameters:,} parameters, {self.nbytes:,} bytes)"
