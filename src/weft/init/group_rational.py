"""Learnable activations: a rational function for each group of channels, which starts as GELU, SiLU or the identity.

The activation of the Kolmogorov–Arnold Transformer, Yang and Wang, arXiv:2409.10594 (2024).

    y = P(x) / Q(x)        P of degree 5, Q ≥ 1 of degree 4, in one of two forms: :mod:`weft.init.rational_fit`

x: (…, D) in g groups of D / g neighbours; P: (1, 6), shared by the groups; Q: (g, 4), for each group.

Differences from the paper and its code: each form of Q has coefficients of its own. Names and shapes of parameters are
those of the code. Beyond [-3, 3], where the coefficients are fitted, F is not the activation: SiLU's grows as |x| on both
sides, GELU's as x² in form A and downwards in form B. Fit a wider interval where inputs are larger.
Complexity: 9 multiplications and one division an element, in float32: |x|⁵ overflows float16 from 9.2 on. Without a
fused kernel some ten passes over memory; torch.compile makes them one. Re-implemented from the equations (official code:
MIT; its kernels: no licence).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError, ShapeError
from weft.function.layer import LayerMethod
from weft.init.rational_fit import FORMS, ORDERS, PRESETS, RationalFit, rational
from weft.method import parameter


@dataclass(frozen=True)
class GroupRationalConfig:
    """A learnable activation.

    >>> GroupRationalConfig(groups=2, activation="gelu").build(6)
    GroupRational(6, groups=2, activation=gelu, form=A)
    """

    groups: int = parameter(8, "groups of channels with a denominator each", minimum=1)
    activation: str = parameter("silu", "what it starts as", choices=("identity", "gelu", "silu"))
    form: str = parameter("A", "of the denominator", choices=FORMS)
    axis: int = parameter(-1, "where the channels are: -1, or 1 in (batch, channels, …)", minimum=-1, maximum=1)

    def build(self, features: int) -> nn.Module:
        """The layer."""
        return GroupRational(features, **asdict(self))


class GroupRational(nn.Module):
    """A rational activation with one numerator and a denominator for each group of channels.

    Args:
        features: D; None takes any number that the groups divide.
        groups: of D / groups neighbouring channels.
        activation: "identity", "gelu" or "silu" (the paper's swish), which it starts as.
        form: "A" or "B", of the denominator.
        axis: where the channels are: -1, or 1 in (batch, channels, …).

    Raises:
        RecipeError: groups do not divide the features, or an unknown activation or form.

    Source: arXiv:2409.10594, section on group rational functions.

    >>> x = torch.tensor([[-1.0, 0.5]])
    >>> GroupRational(2, groups=2, activation="identity")(x)
    tensor([[-1.0000, 0.5000]], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self,
        features: int | None,
        groups: int = 8,
        *,
        activation: str = "silu",
        form: str = "A",
        axis: int = -1,
    ):
        super().__init__()
        if (activation, form) not in PRESETS or axis not in (-1, 1):
            known = sorted({name for name, _ in PRESETS})
            raise RecipeError(
                f"An activation is one of {', '.join(known)}, a form A or B, the axis -1 or 1; got {activation!r}, "
                f"{form!r}, {axis!r}. Other functions: set_coefficients_(fit_rational(function))."
            )
        if groups < 1 or (features is not None and (features < 1 or features % groups)):
            raise RecipeError(f"{groups} groups do not divide {features} features evenly; choose a divisor.")
        self.features = features
        self.groups = groups
        self.form = form
        self.axis = axis
        self.weight_numerator = nn.Parameter(torch.empty(1, ORDERS[0] + 1))
        self.weight_denominator = nn.Parameter(torch.empty(groups, ORDERS[1]))
        self.set_coefficients_(PRESETS[activation, form])

    @torch.no_grad()
    def set_coefficients_(self, fit: RationalFit) -> GroupRational:
        """Start as another function, the same in all groups.

            >>> from weft.init import fit_rational
        >>> layer = GroupRational(8).set_coefficients_(fit_rational(torch.tanh))
            >>> bool((layer(torch.ones(8)) - torch.tanh(torch.ones(8))).abs().max() < 1e-5)
            True
        """
        if fit.form != self.form:
            raise RecipeError(f"These coefficients are for form {fit.form}, the layer has form {self.form}; fit again.")
        self.activation = next((name for (name, _), preset in PRESETS.items() if preset is fit), "fitted")
        for weight, values in ((self.weight_numerator, fit.numerator), (self.weight_denominator, fit.denominator)):
            weight.copy_(torch.tensor(values, dtype=torch.float64).expand_as(weight))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(…, D), or (batch, D, …) with axis 1 -> the same shape and dtype."""
        there = x.shape[self.axis] if x.dim() > max(self.axis, 0) else 0
        if there == 0 or there % self.groups or self.features not in (None, there):
            wanted = f"a multiple of {self.groups}" if self.features is None else str(self.features)
            raise ShapeError(
                f"GroupRational expects {wanted} channels on axis {self.axis} and got an input of shape {list(x.shape)}."
            )
        grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(self.axis, (self.groups, -1))
        after = [1] * (1 if self.axis == -1 else x.dim() - self.axis)  # axes behind the groups
        a = self.weight_numerator.to(grouped.dtype).squeeze(0)
        b = self.weight_denominator.to(grouped.dtype).reshape(self.groups, *after, -1)
        first, last = (-2, -1) if self.axis == -1 else (1, 2)
        return rational(grouped, a, b, self.form).flatten(first, last).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.features}, groups={self.groups}, activation={self.activation}, form={self.form}"


METHODS = (
    LayerMethod(
        name="group_rational",
        family="init",
        config=GroupRationalConfig,
        layer=GroupRational,
        trial={"groups": 2},
        starts_as=functional.silu,
        start_error=PRESETS["silu", "A"].error,
        summary="A learnable rational activation for each group of channels, which starts as SiLU, GELU or the identity.",
        goal="train",
        paper="kat",
        checked_by=("closed form", "brute force", "scipy"),
    ),
    LayerMethod(
        name="group_rational_2d",
        family="init",
        config=GroupRationalConfig,
        layer=GroupRational,
        axis=1,
        space=2,
        defaults={"axis": 1, "activation": "identity"},
        trial={"groups": 2},
        starts_as=nn.Identity(),
        summary="The learnable rational activation for images, (batch, channels, …); starts as the identity.",
        goal="train",
        paper="kat",
        checked_by=("closed form", "brute force"),
    ),
)
