"""Learnable activations: a rational function for each group of channels, which starts as GELU, SiLU or the identity.

The activation of the Kolmogorov–Arnold Transformer, Yang and Wang, arXiv:2409.10594 (2024), after Padé units.

    F(x) = P(x) / Q(x),   P = Σᵢ aᵢ xⁱ, i = 0 … 5
    form A:  Q = 1 + Σᵢ |bᵢ| |x|ⁱ        form B:  Q = 1 + |Σᵢ bᵢ xⁱ|,   i = 1 … 4

x: (…, D) in g groups of D / g neighbours; a: (1, 6), shared by the groups; b: (g, 4), for each group. Q ≥ 1, so F has
no poles. The fit minimises Σ (F(x) − f(x))² over a grid of the interval: for given b, a is a linear problem; both move
by Levenberg–Marquardt steps from fixed starts, b ≥ 0 in form A.

Differences from the paper and its code: the paper and its fit have form B, the kernels form A (the fallback without
kernels 1 + Σ |bᵢ| xⁱ, which can be zero), while coefficients are shared: the released ones for GELU miss it by 1.46 in
form A. Here each form has coefficients of its own. |·| has the derivative 1 at 0, as in the kernels, and in both forms:
with 0, as PyTorch's, the identity (b = 0) would never train b. Names and shapes of parameters are those of the code.
Beyond the interval F is not the activation: SiLU's grows as |x| on both sides, GELU's as x² in form A and downwards in
form B. Fit a wider interval where inputs are larger.
Complexity: 9 multiplications and one division an element, in float32: |x|⁵ overflows float16 from 9.2 on. Without a
fused kernel some ten passes over memory; torch.compile makes them one. Re-implemented from the equations (official code:
MIT; its kernels: no licence).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.errors import RecipeError, ShapeError
from weft.function.layer import LayerMethod
from weft.method import parameter

FORMS = ("A", "B")
INTERVAL = (-3.0, 3.0)  # of the paper's fits
_ORDERS = (5, 4)
_POINTS = 1001


@dataclass(frozen=True)
class RationalFit:
    """Coefficients that :func:`fit_rational` found.

    Attributes:
        numerator: a₀ … a₅.
        denominator: b₁ … b₄.
        form: of the denominator.
        error: largest distance from the function on the grid of the fit.
    """

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    form: str
    error: float


# What fit_rational gives for the functions on [-3, 3]; a test fits them again.
PRESETS = {
    ("identity", "A"): RationalFit(
        (0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0),
        "A",
        0.0,
    ),
    ("identity", "B"): RationalFit(
        (0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0),
        "B",
        0.0,
    ),
    ("gelu", "A"): RationalFit(
        (-0.001006208165, 0.4986133339, 0.4061316443, 0.1086788784, 0.0107549342, 0.000477341132),
        (0.0, 0.2104809767, 0.005000461108, 0.0),
        "A",
        0.00283,
    ),
    ("gelu", "B"): RationalFit(
        (-0.0004239856991, 0.5, 0.4026934834, 0.07376060711, -0.01288384072, -0.003727983354),
        (0.0, 0.1475212142, 0.0, -0.007455966709),
        "B",
        0.000911,
    ),
    ("silu", "A"): RationalFit(
        (3.084397048e-07, 0.500000782, 0.2499978131, 0.05326562188, 0.005802723169, 0.0002751536648),
        (4.080412721e-06, 0.1065277103, 1.251249473e-06, 0.0005501509707),
        "A",
        1.16e-06,
    ),
    ("silu", "B"): RationalFit(
        (3.276437576e-07, 0.5, 0.2499973517, 0.05326482018, 0.005802397915, 0.0002751138941),
        (0.0, 0.1065296404, 0.0, 0.0005502277883),
        "B",
        1.16e-06,
    ),
}  # fmt: skip


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


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, form: str = "A") -> Tensor:
    """P(x) / Q(x), by Horner's rule.

    Args:
        x: any shape, at least float32 if powers may overflow.
        numerator: (…, n + 1), constant first; its leading axes broadcast with x.
        denominator: (…, m), linear term first; likewise.
        form: "A" or "B", of the denominator.

    Returns:
        The shape of x.

    Source: arXiv:2409.10594, section on rational functions.

    >>> rational(torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5]))
    tensor([-0.6667, 0.6667])
    """
    a, b = numerator.unbind(-1), denominator.unbind(-1)
    top = a[-1]
    for coefficient in reversed(a[:-1]):
        top = top * x + coefficient
    base, sizes = (_magnitude(x), [_magnitude(v) for v in b]) if form == "A" else (x, b)
    below = sizes[-1] * base
    for size in reversed(sizes[:-1]):
        below = (below + size) * base
    return top / (1 + (below if form == "A" else _magnitude(below)))


def _magnitude(x: Tensor) -> Tensor:
    """|x| with the derivative 1 at 0."""
    return torch.where(x < 0, -x, x)


def fit_rational(
    function: Callable[[Tensor], Tensor], *, form: str = "A", interval: tuple[float, float] = INTERVAL
) -> RationalFit:
    """Coefficients for which P / Q is nearest to a function, in the sum of squares over 1001 points of an interval.

    Args:
        function: elementwise, called with 1001 numbers of float64.
        form: "A" or "B", of the denominator.
        interval: where.

    Returns:
        Coefficients and the largest error.

    Raises:
        RecipeError: the interval is empty, or the function is not elementwise or not finite there.

    Source: arXiv:2409.10594, section on initialisation; the minimiser is described above.

    >>> fit_rational(functional.silu).error < 2e-6
    True
    """
    low, high = interval
    if form not in FORMS or not low < high:
        raise RecipeError(f"A fit needs form A or B and an interval from low to high, got {form!r} and {interval}.")
    with torch.device("cpu"), torch.no_grad():
        x = torch.linspace(low, high, _POINTS, dtype=torch.float64)
        y = function(x)
        if y.shape != x.shape or not bool(y.isfinite().all()):
            raise RecipeError(f"Only elementwise functions that are finite on {interval} can be fitted.")
        scale = max(abs(low), abs(high))  # powers of numbers up to 1 keep the problem well conditioned
        a, b = _best(_Problem(x / scale, y.double(), form))
        powers = scale ** torch.arange(_ORDERS[0] + 1, dtype=torch.float64)
        a, b = a / powers, b / powers[1 : _ORDERS[1] + 1]
        error = (rational(x, a, b, form) - y).abs().max()
    return RationalFit(tuple(a.tolist()), tuple(b.tolist()), form, float(error))


def _best(problem: _Problem) -> tuple[Tensor, Tensor]:
    starts = [torch.zeros(_ORDERS[1], dtype=torch.float64), *torch.eye(_ORDERS[1], dtype=torch.float64)]
    found = [problem.minimise(start) for start in starts]
    losses = [problem.loss(*pair) for pair in found]
    # of equal ones the first, so that a polynomial keeps the denominator 1
    enough = min(losses) * (1 + 1e-9) + 1e-24 * float(problem.y.square().sum())
    return next(pair for pair, loss in zip(found, losses) if loss <= enough)


class _Problem:
    """Least squares for P / Q, in float64."""

    def __init__(self, x: Tensor, y: Tensor, form: str):
        self.y = y
        self.form = form
        self.top = x.unsqueeze(1) ** torch.arange(_ORDERS[0] + 1)
        self.below = (x.abs() if form == "A" else x).unsqueeze(1) ** torch.arange(1, _ORDERS[1] + 1)

    def residual(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each point the error, Q, and the sign with which b enters Q."""
        mixed = self.below @ b
        sign = torch.where(mixed < 0, -1.0, 1.0).double()
        q = 1 + mixed.abs()
        return self.top @ a / q - self.y, q, sign

    def loss(self, a: Tensor, b: Tensor) -> float:
        """Sum of squares."""
        return float(self.residual(a, b)[0].square().sum())

    def numerator(self, b: Tensor) -> Tensor:
        """The best a for this b."""
        q = self.residual(self.top.new_zeros(self.top.shape[1]), b)[1].unsqueeze(1)
        best: Tensor = torch.linalg.lstsq(self.top / q, self.y.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        return best

    def minimise(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """Levenberg–Marquardt steps, projected to b ≥ 0 in form A, with the best a after each."""
        a, damping = self.numerator(b), 1e-3
        loss = self.loss(a, b)
        for _ in range(500):
            error, q, sign = self.residual(a, b)
            slope = -(sign * (error + self.y) / q).unsqueeze(1) * self.below
            free = torch.ones_like(b, dtype=torch.bool)
            if self.form == "A":  # what stands at its bound and would leave it stays
                free = (b > 0) | (slope.mT @ error < 0)
            # what the numerator can follow is taken out of the slopes (variable projection, Kaufman's form)
            basis = torch.linalg.qr(self.top / q.unsqueeze(1)).Q
            slope = slope[:, free] - basis @ (basis.mT @ slope[:, free])
            gram, right = slope.mT @ slope, slope.mT @ error
            before = loss
            while damping < 1e12:
                step = torch.linalg.solve(gram + damping * torch.diag(gram.diagonal() + 1e-12), right)
                moved = b.clone()
                moved[free] -= step
                moved = moved.clamp_min(0) if self.form == "A" else moved
                other = self.numerator(moved)
                now = self.loss(other, moved)
                if now < loss:
                    a, b, loss, damping = other, moved, now, max(damping / 10, 1e-12)
                    break
                damping *= 10
            if not before - loss > 1e-13 * before:
                break
        return a, b


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
        self.weight_numerator = nn.Parameter(torch.empty(1, _ORDERS[0] + 1))
        self.weight_denominator = nn.Parameter(torch.empty(groups, _ORDERS[1]))
        self.set_coefficients_(PRESETS[activation, form])

    @torch.no_grad()
    def set_coefficients_(self, fit: RationalFit) -> GroupRational:
        """Start as another function, the same in all groups.

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
