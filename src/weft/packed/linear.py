"""Linear layers and embeddings over packed weights.

Buffers of a layer are the tensors of its packed weight, in few bits: its state dict is what a file holds, conversions of
type leave it alone, and it does not train. Gradients reach the inputs, so adapters can stand on top (``weft.adapt_``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from weft.errors import CheckpointError, RecipeError, did_you_mean
from weft.packed.form import Packed, unpack
from weft.packed.product import LARGEST, LARGEST_ON_GPU, WAYS, facts_of, packed_linear, packed_rows, prepare, ways
from weft.packed.rows import dequantize, some_rows

F = TypeVar("F", bound=Callable[..., Any])
_ALL = 1 << 62
_EXTRA = "_extra_state"


class _Holder(nn.Module):
    """What layers over a packed weight share: its tensors as buffers, its facts in the state dict."""

    shape: tuple[int, int]

    def __init__(self, packed: Packed):
        super().__init__()
        self._hold(packed.tensors(), packed.settings(), packed.shape)

    def _hold(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], shape: tuple[int, int]) -> None:
        self.settings, self.shape, self._names = dict(settings), shape, tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the packed weight, by name."""
        return {name: self._buffers[name] for name in self._names}

    def packed(self) -> Packed:
        """The packed weight, as :meth:`from_packed` took it."""
        return unpack(self.tensors(), self.settings)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return sum(t.nbytes for t in self.tensors().values())

    def get_extra_state(self) -> Tensor:
        """The facts of the packed weight, JSON as bytes in a tensor, so that all formats of state dicts can hold it."""
        return _as_bytes({"settings": self.settings, "shape": list(self.shape)})

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a state dict is of the same form.

        Raises:
            CheckpointError: it is not.
        """
        found = _from_bytes(state)
        if found != {"settings": self.settings, "shape": list(self.shape)}:
            raise CheckpointError(
                f"The state dict has a packed weight {found}, and this layer has {self.settings} of {list(self.shape)}; "
                f"make a new layer from it: {type(self).__name__}.from_state_dict."
            )

    def _kept(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A change of all tensors of a module that changes no type of the packed ones."""
        mine = {id(t) for t in self.tensors().values()}

        def kept(tensor: Tensor) -> Tensor:
            made = change(tensor)
            return made if id(tensor) not in mine or made.dtype == tensor.dtype else tensor.to(made.device)

        return kept

    def _form(self) -> str:
        settings, words = self.settings, []
        while "inner" in settings:
            words.append(str(settings["form"]))
            settings = settings["inner"]
        words.append(f"{settings['form']}, bits={8 * self.nbytes / max(self.shape[0] * self.shape[1], 1):.2f}")
        return " of ".join(words)


def _constant(function: F) -> F:
    """``torch.compiler.assume_constant_result`` without importing the compiler, which takes a second and 80 MB."""
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010  no attribute that a function's type has
    return function


class QuantizedLinear(_Holder):
    """Multiplies by a packed weight: y = x Ŵᵀ + bias.

    What it computes is ``x @ packed.dequantize().T``; how depends on form, machine, type and batch, see
    :mod:`weft.packed.product`. Types of inputs rule: in float32 products are exact and the weight is unpacked each time;
    in bfloat16 (also by autocast, or ``dtype``) small batches are several times faster than with a dense weight.

    The first small batch makes a copy of the codes in the machine's own order, as large as they (8 bits a weight for
    ``int8`` and ``integer``). The codes stay, for large batches and the state dict. :meth:`release` drops the copy, and
    ``backend="dequantize"`` never makes it.

    Attributes:
        in_features, out_features: of the matrix.
        dtype: the type that products are computed in, whatever that of the inputs; None for theirs.
        bias: (out,), or None.

    >>> from weft.packed import Affine
    >>> packed = Affine(torch.tensor([[3, 0, 1]], dtype=torch.int16), torch.ones(1, 1), torch.ones(1, 1), 2, 0)
    >>> layer = QuantizedLinear.from_packed(packed, bias=torch.tensor([0.5]))
    >>> layer(torch.tensor([[1.0, 2.0, 3.0]])).tolist(), layer
    ([[0.5]], QuantizedLinear(in_features=3, out_features=1, bias=True, affine, bits=24.00))
    """

    packed_linear = True  # how weft.function tells it from others without importing this module
    of_experts = False

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
        backend: str = "auto",
    ):
        super().__init__(packed)
        self._finish(bias, dtype, transposed, backend)

    def _finish(self, bias: Tensor | None, dtype: torch.dtype | None, transposed: bool, backend: str) -> None:
        self.out_features, self.in_features = self.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise RecipeError(f"A bias of {self.out_features} outputs is needed, got {list(bias.shape)}.")
        if dtype is not None and not dtype.is_floating_point:
            raise RecipeError(f"Products are computed in a floating-point type, got {dtype}.")
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.dtype, self.transposed = dtype, transposed
        self._ready: list[Tensor] = []
        self._way, self._facts = "", ""
        self._failed: tuple[str, ...] = ()
        self.backend = backend

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
        backend: str = "auto",
    ) -> Self:
        """A layer over a packed weight.

        Args:
            packed: (out, in).
            bias: (out,); a parameter stays the one that it is.
            dtype: the type that products are computed in; None for that of the inputs.
            transposed: the layer stands for one that stores (in, out), as GPT-2's do; ``weight`` is turned then.
            backend: a way of :mod:`weft.packed.product`, or "auto".
        """
        return cls(packed, bias, dtype=dtype, transposed=transposed, backend=backend)

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        prefix: str = "",
        *,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
        backend: str = "auto",
    ) -> Self:
        """A layer from the state dict of one; the tensors are shared with it.

        Args:
            state: with the layer's tensors at ``prefix``.
            prefix: such as ``"model.layers.0.mlp.up_proj."``.

        Raises:
            CheckpointError: there is no such layer, or it is incomplete.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        tensors, settings, shape = _read(state, prefix)
        bias = tensors.pop("bias", None)
        made._hold(tensors, settings, shape)
        made._finish(bias, dtype, transposed, backend)
        return made

    @property
    def backend(self) -> str:
        """The way that products go: "auto", or one of :data:`weft.packed.product.WAYS` that it is held to."""
        return self._backend

    @backend.setter
    def backend(self, way: str) -> None:
        if way not in WAYS:
            raise RecipeError(f"There is no way {way!r} to multiply.{did_you_mean(way, WAYS)}")
        possible = (*ways(self.tensors(), self.settings), "auto", "triton")
        if way not in possible:
            raise RecipeError(f"This weight ({self._form()}) has no products by the way {way!r}, only {possible}.")
        self._backend = way
        self._renew()

    @property
    def weight(self) -> Tensor:
        """The matrix that it multiplies by, unpacked anew whenever it is asked for: (out, in), or (in, out) if transposed.

        Of type ``dtype``, or float32. Nothing that is written to it has an effect.
        """
        made = self.unpacked()
        return made.T if self.transposed else made

    def unpacked(self) -> Tensor:
        """The matrix (out, in), of type ``dtype`` or float32."""
        return dequantize(self.tensors(), self.settings).to(self.dtype or torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out), of the inputs' type, or autocast's."""
        y = self.multiply(x)
        if self.bias is None:
            return y
        return y + (self.bias if self.bias.dtype == y.dtype else self.bias.to(y.dtype))

    def multiply(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out) without the bias."""
        if x.shape[-1] != self.in_features:
            raise RecipeError(f"Inputs have {self.in_features} columns here, got {list(x.shape)}.")
        if not x.is_floating_point():
            raise RecipeError(f"Inputs are of a floating-point type, got {x.dtype}.")
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        way, facts = self._chosen()
        ready: list[Tensor] = []
        if device == "cpu" and self._serves(way, x) and self._prepared():
            ready = self._ready
        return packed_linear(x, [self._buffers[name] for name in self._names], ready, facts)

    def release(self) -> None:
        """Drop the copy of the codes that small batches multiply by; the next one makes it again."""
        self._ready = []

    def _serves(self, way: str, x: Tensor) -> bool:
        """Whether inputs are such that the copy of the codes is wanted."""
        if way == "integer":
            return True
        if way not in LARGEST or (self._backend == "auto" and (self.dtype or x.dtype) != torch.bfloat16):
            return False
        # compiled code decides at each call; here, batches that are always large make no copy
        return torch.compiler.is_compiling() or self._backend != "auto" or x.numel() <= LARGEST[way] * x.shape[-1]

    @_constant
    def _chosen(self) -> tuple[str, str]:
        """The way, and what the operator is told; decided once, by the values of zero points among others."""
        if not self._facts or not self._has_values():
            way = self._backend
            if way == "auto" and self._has_values():
                way = next(w for w in ways(self.tensors(), self.settings) if w not in self._failed)
                way = "auto" if way == "dequantize" else way
            most = LARGEST.get(way, LARGEST_ON_GPU if way == "auto" else _ALL)
            dtype = "" if self.dtype is None else str(self.dtype).removeprefix("torch.")
            largest = most if self._backend == "auto" else _ALL
            facts = facts_of(self._names, self.settings, self.shape, way, largest, dtype)
            if not self._has_values():
                return way, facts
            self._way, self._facts = way, facts
        return self._way, self._facts

    def _has_values(self) -> bool:
        """Whether there are numbers: on meta, and while torch.export looks at a model, there are none."""
        return all(type(t) in (Tensor, nn.Parameter, nn.Buffer) and not t.is_meta for t in self.tensors().values())

    @_constant
    def _prepared(self) -> bool:
        """Whether the copy of the codes is there; made if it was not."""
        if not self._has_values():
            return False
        if not self._ready and self._way not in self._failed:
            with torch.no_grad():
                self._ready = prepare(self._way, self.tensors(), self.settings, self.shape)
            if not self._ready:
                self._failed = (*self._failed, self._way)
        return bool(self._ready)

    def _renew(self) -> None:
        """Choose again: tensors are others, or elsewhere."""
        self._ready, self._way, self._facts, self._failed = [], "", "", ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(self._kept(fn), recurse)
        self._renew()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._renew()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": [], "_way": "", "_facts": "", "_failed": ()}

    def extra_repr(self) -> str:
        """Form, sizes and bits."""
        more = "".join(
            f", {name}={value}"
            for name, value, usual in (
                ("dtype", self.dtype, None),
                ("transposed", self.transposed, False),
                ("backend", self._backend, "auto"),
            )
            if value != usual
        )
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._form()}{more}"
        )


class QuantizedEmbedding(_Holder):
    """Looks up rows of a packed table; only these are unpacked.

    Attributes:
        num_embeddings, embedding_dim: of the table.
        padding_idx: as in ``nn.Embedding``; rows do not train here, so it says no more than which row it is.
        dtype: the type of what is looked up; ``.to(dtype)`` changes it.

    >>> from weft.packed import Affine
    >>> packed = Affine(torch.tensor([[3, 0], [1, 2]], dtype=torch.int16), torch.ones(2, 1), torch.ones(2, 1), 2, 0)
    >>> QuantizedEmbedding.from_packed(packed)(torch.tensor([1, 1, 0])).tolist()
    [[0.0, 1.0], [0.0, 1.0], [2.0, -1.0]]
    """

    def __init__(self, packed: Packed, *, padding_idx: int | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(packed)
        self._finish(padding_idx, dtype)

    def _finish(self, padding_idx: int | None, dtype: torch.dtype) -> None:
        if not dtype.is_floating_point:
            raise RecipeError(f"Rows are of a floating-point type, got {dtype}.")
        if some_rows(self.tensors(), self.settings, slice(0, 1)) is None or self.settings["form"] == "activations":
            raise RecipeError(
                f"A table is looked up by rows, and rows of this form ({self._form()}) do not stand for themselves; "
                "quantise it in groups along its columns."
            )
        self.num_embeddings, self.embedding_dim = self.shape
        self.padding_idx, self.dtype = padding_idx, dtype
        self._facts = facts_of(self._names, self.settings, self.shape, "dequantize", _ALL, "")

    @classmethod
    def from_packed(cls, packed: Packed, *, padding_idx: int | None = None, dtype: torch.dtype = torch.float32) -> Self:
        """An embedding over a packed table (rows, columns).

        Raises:
            RecipeError: rows of the form do not stand for themselves.
        """
        return cls(packed, padding_idx=padding_idx, dtype=dtype)

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        prefix: str = "",
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """An embedding from the state dict of one, at ``prefix``.

        Raises:
            CheckpointError: there is no such layer, or it is incomplete.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._hold(*_read(state, prefix))
        made._finish(padding_idx, dtype)
        return made

    @property
    def weight(self) -> Tensor:
        """The table (rows, columns), unpacked anew whenever it is asked for; nothing that is written to it has an effect."""
        return dequantize(self.tensors(), self.settings).to(self.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (…) -> (…, columns)."""
        return packed_rows(tokens, [self._buffers[name] for name in self._names], self.dtype, self._facts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(self._kept(fn), recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Form, sizes and bits."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._form()}"


@contextmanager
def using_backend(model: nn.Module, way: str) -> Iterator[None]:
    """For the length of a ``with``: all quantised linear layers of a model multiply in one way.

    Raises:
        RecipeError: a layer's weight has no such way; "dequantize" is one of all.

    >>> from weft.packed import Affine
    >>> packed = Affine(torch.ones(1, 2, dtype=torch.int16), torch.ones(1, 1), torch.zeros(1, 1), 4, 0)
    >>> layer = QuantizedLinear.from_packed(packed)
    >>> with using_backend(layer, "dequantize"):
    ...     layer.backend
    'dequantize'
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    before = [layer.backend for layer in layers]
    try:
        for layer in layers:
            layer.backend = way
        yield
    finally:
        for layer, old in zip(layers, before):
            layer.backend = old


def _as_bytes(facts: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)


def _from_bytes(state: Any) -> dict[str, Any]:
    try:
        made = json.loads(bytes(state.tolist()).decode())
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"What a state dict says about a packed weight cannot be read: {error}.") from None
    return dict(made)


def _read(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Any], tuple[int, int]]:
    """Tensors, settings and shape of the layer at ``prefix``."""
    mine = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    if _EXTRA not in mine:
        raise CheckpointError(f"The state dict has no packed weight at {prefix!r}: there is no {prefix + _EXTRA!r}.")
    facts = _from_bytes(mine.pop(_EXTRA))
    tensors = {name: t for name, t in mine.items() if "." not in name}
    packed = unpack({name: t for name, t in tensors.items() if name != "bias"}, facts.get("settings", {}))
    if list(packed.shape) != facts.get("shape"):
        raise CheckpointError(f"The packed weight at {prefix!r} is {list(packed.shape)}, not {facts.get('shape')}.")
    return tensors, dict(facts["settings"]), packed.shape
