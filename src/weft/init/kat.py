"""Transformer MLPs whose activations are learned, started so that variance passes through, and from trained GELU models.

The Kolmogorov–Arnold Transformer, Yang and Wang, arXiv:2409.10594 (2024).

    GR-KAN(x) = W₂ F₂(W₁ F₁(x) + c₁) + c₂          F: :class:`weft.init.GroupRational`; F₁ starts as the identity
    Var W = α / d_in,  α = E[z²] / E[F(z)²] = 1 / E[F(z)²],  z ~ N(0, 1)        gain = √α, as in torch.nn.init

x: (…, d). E is computed by Gauss–Hermite quadrature: α = 1 for the identity, 2 for ReLU, 1 / (1/3 + 1/(2π√3)) = 2.3517
for GELU, 2.8110 for SiLU.

Differences from the paper and its code: the published gains, 2.3568 and 2.8178, are from samples. The released training
code fills W₁ and W₂ by this law and then overwrites them (truncated normal of deviation 0.02); here the law stands. It
takes the gain of the functions that are there, trained ones too, and sets biases to zero, as the code does.
torch.nn.init is left as it is. Variance 1 is a fixed point, but one that small differences leave (SiLU: by a factor of
1.17 a layer), so put a norm in front of each GR-KAN, as transformers have it.
Complexity: one pass over the weights; 6 + 4 groups parameters more for each activation. Re-implemented from the
equations (official code: MIT).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from weft.errors import RecipeError
from weft.function.initializer import InitMethod, plain_parameter
from weft.function.layer import WHITE_NOISE, LayerMethod
from weft.function.where import Selector, matches, nearest_names, output_heads
from weft.init.group_rational import GroupRational
from weft.init.rational_fit import FORMS, INTERVAL, PRESETS, RationalFit, fit_rational, rational
from weft.method import parameter

_NODES = 200  # of the quadrature: exact for polynomials up to degree 399, and 1e-10 for GELU and SiLU


@dataclass(frozen=True)
class GRKANConfig:
    """A two-layer MLP with learned activations.

    >>> GRKANConfig(hidden_features=16).build(8).fc1
    Linear(in_features=8, out_features=16, bias=True)
    """

    hidden_features: int | None = parameter(None, "channels inside; none: four times the input's", minimum=1)
    activation: str = parameter("silu", "what the second function starts as", choices=("identity", "gelu", "silu"))
    groups: int = parameter(8, "groups of channels with a denominator each", minimum=1)
    form: str = parameter("A", "of the denominator", choices=FORMS)

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return GRKAN(features, **asdict(self))


@dataclass(frozen=True)
class GRKANVariancePreserving:
    """Configuration of :func:`gr_kan_variance_preserving_`: nothing to choose."""


def activation_gain(function: Callable[[Tensor], Tensor]) -> float:
    """√(1 / E[F(z)²]) for z ~ N(0, 1): with weights of variance gain² / fan_in after F, variance passes through.

    Args:
        function: elementwise, called with the nodes of the quadrature, (200,), in float64.

    Returns:
        The gain, as ``torch.nn.init.calculate_gain`` gives it for the functions that it knows. Smooth functions are
        exact to about 1e-10, ReLU too by symmetry; other kinks cost digits.

    Raises:
        RecipeError: the function is zero or not finite at the nodes, or not elementwise.

    Source: arXiv:2409.10594, section on variance-preserving initialisation.

    >>> round(activation_gain(torch.relu) ** 2, 6), round(activation_gain(nn.functional.gelu) ** 2, 4)
    (2.0, 2.3517)
    """
    places, weights = _quadrature()
    nodes = torch.from_numpy(places.copy())
    with torch.no_grad():
        values = function(nodes).double()
    if values.shape != nodes.shape:
        raise RecipeError(f"A gain is that of an elementwise function; this one made {list(values.shape)} of (200,).")
    # far nodes have weights that underflow, and a function may overflow there
    square = float(np.sum(weights * np.square(values.numpy())) / math.sqrt(2 * math.pi))
    if not 0 < square < math.inf:
        raise RecipeError(f"The function's mean square over N(0, 1) is {square}, so no weights keep the variance.")
    return 1 / math.sqrt(square)


@cache
def _quadrature() -> tuple[Any, Any]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return nodes, weights


class GRKAN(nn.Module):
    """An MLP with a learned function in front of each of its two linear layers, named as in vision transformers.

    Args:
        in_features: d.
        hidden_features: channels inside; None: 4 d.
        out_features: None: d.
        activation: what the second function starts as; the first is the identity.
        groups: of both functions.
        form: "A" or "B", of their denominators.

    Raises:
        RecipeError: groups do not divide the features.

    Source: arXiv:2409.10594, section on GR-KAN.

    >>> GRKAN(8, 32)(torch.ones(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        activation: str = "silu",
        groups: int = 8,
        form: str = "A",
    ):
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        self.act1 = GroupRational(in_features, groups, activation="identity", form=form)
        self.fc1 = nn.Linear(in_features, hidden)
        self.act2 = GroupRational(hidden, groups, activation=activation, form=form)
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features)
        if not self.fc1.weight.is_meta:  # on the meta device there is nothing to fill
            gr_kan_variance_preserving_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        y: Tensor = self.fc2(self.act2(self.fc1(self.act1(x))))
        return y


@torch.no_grad()
def gr_kan_variance_preserving_(module: GRKAN, generator: Generator | None = None) -> GRKAN:
    """Fill both linear layers of a GR-KAN so that inputs of variance 1 become outputs of variance 1, in place.

    Args:
        module: the GR-KAN; gains are those of its functions as they are now.
        generator: of torch; torch's global one if None.

    Returns:
        The module.

    Raises:
        RecipeError: it is no GR-KAN, or a weight function computes one of its weights.

    Source: arXiv:2409.10594, section on variance-preserving initialisation.

    >>> mlp = gr_kan_variance_preserving_(GRKAN(64, 256), torch.Generator().manual_seed(0))
    >>> abs(mlp.fc2.weight.var().item() * 256 / 2.811 - 1) < 0.05
    True
    """
    if not isinstance(module, GRKAN):
        raise RecipeError(f"This start is for a GRKAN, got a {type(module).__name__}; give it one module at a time.")
    layers = [(module.act1, module.fc1), (module.act2, module.fc2)]
    plain = [[plain_parameter(linear, n) for n in ("weight", "bias")] for _, linear in layers]  # before any is filled
    for (function, _), (weight, bias) in zip(layers, plain):
        gain = activation_gain(partial(_root_mean_square, function))
        weight.normal_(0, gain / math.sqrt(weight.shape[1]), generator=generator)
        bias.zero_()
    return module


def _root_mean_square(function: GroupRational, z: Tensor) -> Tensor:
    """(n) -> (n): over the groups."""
    a, b = (w.detach().to("cpu", z.dtype) for w in (function.weight_numerator, function.weight_denominator))
    return rational(z.unsqueeze(-1), a.squeeze(0), b, function.form).square().mean(-1).sqrt()


@torch.no_grad()
def replace_activations_(
    model: nn.Module,
    where: Selector | None = None,
    *,
    groups: int = 8,
    form: str = "A",
    axis: int = -1,
    interval: tuple[float, float] = INTERVAL,
) -> dict[str, float]:
    """Replace activations of a trained model by learnable rational ones that compute the same, in place.

    Args:
        model: any module; make the optimizer afterwards.
        where: which modules, see :mod:`weft.function.where`; each must be an elementwise function. If None, all GELU and
            SiLU, those of transformers too.
        groups: of each new activation; must divide its channels, which is checked when it runs.
        form: "A" or "B", of the denominators.
        axis: where the channels are: -1, or 1 in (batch, channels, …).
        interval: where the new functions are fitted. Beyond it they differ: give the range of the model's activations.

    Returns:
        Names of what was replaced, each with the largest error on the interval. A module used in several places is
        replaced by one module there, and listed once.

    Raises:
        RecipeError: nothing matched, the model is an activation itself, or a module is not elementwise. The model is
            then unchanged.

    Source: arXiv:2409.10594, section on initialisation from a pretrained transformer.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    >>> replace_activations_(model)
    {'1': 1.16e-06}
    """
    where = _gelu_or_silu if where is None else where
    heads, modules = output_heads(model), list(model.named_modules())
    inside = [(n, m) for n, m in modules if m is not model] or modules
    chosen = [(n, m) for n, m in inside if matches(where, n, m, heads) and not isinstance(m, GroupRational)]
    if not chosen or not next(model.children(), None):
        hint = nearest_names(where, [(n, m) for n, m in modules if n and not next(m.children(), None)])
        raise RecipeError(
            "The model is the activation itself; put the new one in its place."
            if chosen
            else f"{_no_module(where)}; functions that forward() calls are not modules.{hint}"
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    fits: dict[str, RationalFit] = {}
    for name, module in chosen:
        try:
            fits[name] = _fit(module, form, interval)
        except (RecipeError, RuntimeError, ValueError, TypeError) as error:
            raise RecipeError(f"{name!r}, a {type(module).__name__}, is no elementwise activation: {error}") from None
    made = {}
    for name, module in chosen:
        new = GroupRational(None, groups, form=form, axis=axis).to(like.device, like.dtype)
        made[id(module)] = new.set_coefficients_(fits[name]).train(module.training)
    for _, parent in modules:
        for child, module in parent._modules.items():
            if module is not None and id(module) in made:
                setattr(parent, child, made[id(module)])
    return {name: fit.error for name, fit in fits.items()}


def _gelu_or_silu(path: str, module: nn.Module) -> bool:
    """Of torch, or an activation of transformers that is one of these by its name."""
    kind = type(module)
    named = kind.__module__ == "transformers.activations" and any(n in kind.__name__ for n in ("GELU", "SiLU"))
    return isinstance(module, nn.GELU | nn.SiLU) or named


def _no_module(where: Selector) -> str:
    return "The model has no GELU and no SiLU" if where is _gelu_or_silu else f"No module was chosen by {where!r}"


def _fit(module: nn.Module, form: str, interval: tuple[float, float]) -> RationalFit:
    exact = isinstance(module, nn.GELU) and module.approximate == "none"
    known = "silu" if isinstance(module, nn.SiLU) else "gelu" if exact else ""
    if known and tuple(interval) == INTERVAL and (known, form) in PRESETS:
        return PRESETS[known, form]
    return fit_rational(module, form=form, interval=interval)


METHODS = (
    InitMethod(
        name="gr_kan_variance_preserving",
        family="init",
        config=GRKANVariancePreserving,
        summary="Weights of a GR-KAN drawn so that variance passes through its learned functions.",
        goal="train",
        paper="kat",
        function=gr_kan_variance_preserving_,
        trial=lambda: GRKAN(8, 16),
        apply=lambda model, generator: gr_kan_variance_preserving_(model, generator=generator),
        fills=("fc1.weight", "fc2.weight"),
        checked_by=("closed form", "scipy"),
    ),
    LayerMethod(
        name="gr_kan",
        family="init",
        config=GRKANConfig,
        layer=GRKAN,
        trial={"groups": 2, "activation": "identity"},
        starts_as=WHITE_NOISE,
        summary="A transformer's MLP with learned activations, started so that variance passes through.",
        goal="train",
        paper="kat",
        checked_by=("closed form", "scipy"),
    ),
)
