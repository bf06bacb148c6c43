"""Hooks that give the inputs of layers to collectors: rows without padding, once for layers that share their input."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate.collectors import Inputs
from weft.calibrate.experts import Slice, is_experts
from weft.calibrate.sums import patches
from weft.errors import RecipeError
from weft.function.where import is_linear

Mask = Callable[[Tensor], Tensor | None]  # for the input of a layer: which tokens are not padding, if that is known
_PATCH_ELEMENTS = 1 << 24  # of a convolution's patches at a time


def is_convolution(module: nn.Module) -> bool:
    """Whether a module multiplies patches by one matrix: convolutions that are not transposed."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def layers_of(model: nn.Module, name: str = "") -> dict[str, nn.Module]:
    """Layers whose inputs can be counted, by full name: linear layers, GPT-2's Conv1D, convolutions.

    >>> sorted(layers_of(nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU(), nn.Linear(1, 1))))
    ['0', '2']
    """
    found = {p: m for p, m in model.named_modules() if is_linear(m) or is_convolution(m)}
    return {".".join(q for q in (name, p) if q): m for p, m in found.items()}


class Routing:
    """How often each expert is chosen.

    Attributes:
        counts: (experts,) int64: tokens that chose it.
        weights: (experts,) float64: sum of the weights that they gave it.
        rows: tokens.
    """

    def __init__(self, experts: int):
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self.weights = torch.zeros(experts, dtype=torch.float64)
        self.rows = 0

    def update(self, chosen: Tensor, weights: Tensor) -> None:
        """Add tokens: experts chosen and their weights, both (tokens, k)."""
        experts = len(self.counts)
        flat = chosen.flatten()
        self.counts += torch.bincount(flat, minlength=experts)[:experts]
        self.weights += torch.bincount(flat, weights.flatten().double(), minlength=experts)[:experts]
        self.rows += len(chosen)

    def result(self) -> dict[str, Tensor]:
        """``routing_counts`` and ``routing_weights``: (experts,)."""
        return {"routing_counts": self.counts, "routing_weights": self.weights}


class Watch:
    """While a ``with`` lasts, everything that layers are given is counted.

    Args:
        layers: by full name; those that are given the very same tensor share one collector.
        what: kinds of :data:`weft.calibrate.collectors.KINDS`.
        experts: modules of fused experts, for routing, by full name.
        mask: tells padding for the input of a layer.

    Attributes:
        inputs: collectors by the name of the first layer that was given the tensor.
        leaders: for each layer that ran, that first layer.
        routing: by the name of the experts' module.
        experts: see above.
        unmasked: layers whose rows could not be told to be padding or not, so that all were counted.

    >>> model = nn.Linear(2, 3)
    >>> with Watch({"layer": model}, ["mean"]) as watch:
    ...     _ = model(torch.ones(4, 2))
    >>> watch.inputs["layer"].result()["mean"].tolist()
    [1.0, 1.0]
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        what: Sequence[str],
        *,
        experts: Mapping[str, nn.Module] | None = None,
        mask: Mask = lambda x: None,
    ):
        self.inputs: dict[str, Inputs] = {}
        self.leaders: dict[str, str] = {}
        self.routing: dict[str, Routing] = {}
        self.unmasked: set[str] = set()
        self._layers, self.experts, self._what, self._mask = layers, experts or {}, what, mask
        self._recent: list[tuple[weakref.ref[Tensor], int, Any, str]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        hooks: list[tuple[nn.Module, Any]] = []
        if self._what:
            hooks += [(module, self._seeing(name)) for name, module in self._layers.items()]
        hooks += [(module, self._routing_of(name)) for name, module in self.experts.items()]
        self._handles = [m.register_forward_pre_hook(h, with_kwargs=True) for m, h in hooks]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._recent.clear()

    def _seeing(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(name, module, args[0] if args else next(iter(kwargs.values())))

        return hook

    @torch.no_grad()
    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        shape, version = _geometry(module), x._version
        self._recent = [r for r in self._recent if r[0]() is not None]
        same = next((r[3] for r in self._recent if r[0]() is x and r[1:3] == (version, shape)), None)
        leader = self.leaders.setdefault(name, same or name)
        if same is not None and same == leader:
            return
        if leader != name or same is not None:
            raise RecipeError(
                f"{name} was given the tensor that {leader} was given in one batch, and another in the next, so that they "
                "cannot share statistics. Gather the statistics of one of them at a time."
            )
        inputs = self.inputs.get(name)
        if inputs is None:
            inputs = self.inputs[name] = Inputs(name, self._what, getattr(module, "groups", 1))
        inputs.update(self._rows(name, module, x), _patches(module, x) if is_convolution(module) else None)
        self._recent.append((weakref.ref(x), version, shape, name))

    def _rows(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        if is_convolution(module):
            batched = _batched(module, x)
            return batched.movedim(1, -1).reshape(-1, batched.shape[1])
        keep = self._mask(x)
        rows = x.reshape(-1, x.shape[-1])
        if keep is None:
            return rows
        keep = keep.flatten().bool()
        if isinstance(module, Slice) and module.rows is not None:
            keep = keep[module.rows]
        if len(keep) != len(rows):
            self.unmasked.add(name)
            return rows
        return rows if bool(keep.all()) else rows[keep]

    def _routing_of(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            hidden, chosen, weights = {**dict(zip(names, args)), **kwargs}.values()
            keep = self._mask(hidden)
            if keep is not None and keep.numel() == len(chosen):
                kept = keep.flatten().bool()
                chosen, weights = chosen[kept], weights[kept]
            elif keep is not None:
                self.unmasked.add(name)
            if name not in self.routing:
                self.routing[name] = Routing(module.down_proj.shape[0])
            self.routing[name].update(chosen, weights)

        return hook


def experts_of(module: nn.Module, name: str = "") -> dict[str, nn.Module]:
    """Modules of fused experts by full name."""
    found = {p: m for p, m in module.named_modules() if is_experts(m)}
    return {".".join(q for q in (name, p) if q): m for p, m in found.items()}


def _geometry(module: nn.Module) -> Any:
    """What, beside the input, the rows that a layer counts depend on."""
    if not is_convolution(module):
        return None
    layer: Any = module
    return (
        layer.kernel_size, layer.stride, layer._reversed_padding_repeated_twice, layer.padding_mode, layer.dilation, layer.groups,
    )  # fmt: skip


def _batched(module: Any, x: Tensor) -> Tensor:
    return x if x.dim() == len(module.kernel_size) + 2 else x.unsqueeze(0)


def _patches(module: Any, x: Tensor) -> Iterator[Tensor]:
    x = _batched(module, x)
    kernel = 1
    for size in module.kernel_size:
        kernel *= size
    images = max(1, _PATCH_ELEMENTS // max(1, kernel * x[:1].numel()))
    return (patches(part, module) for part in x.split(images))


def check_what(what: str | Iterable[str], known: Sequence[str]) -> list[str]:
    """Kinds of statistics in their fixed order.

    Raises:
        RecipeError: one is not known, or there are none.

    >>> check_what("scales,gram", ["gram", "scales"])
    ['gram', 'scales']
    """
    from weft.errors import did_you_mean

    kinds = [k.strip() for k in what.split(",")] if isinstance(what, str) else list(what)
    for kind in kinds:
        if kind not in known:
            raise RecipeError(f"There is no statistic {kind!r}.{did_you_mean(kind, known)}")
    if not kinds:
        raise RecipeError(f"Name at least one statistic: {', '.join(known)}.")
    return [k for k in known if k in kinds]
