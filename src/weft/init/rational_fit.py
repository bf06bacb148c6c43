"""Rational functions without poles, and the coefficients with which they are nearest to an activation.

The functions of the Kolmogorov–Arnold Transformer, Yang and Wang, arXiv:2409.10594 (2024), after Padé units.

    F(x) = P(x) / Q(x),   P = Σᵢ aᵢ xⁱ, i = 0 … 5
    form A:  Q = 1 + Σᵢ |bᵢ| |x|ⁱ        form B:  Q = 1 + |Σᵢ bᵢ xⁱ|,   i = 1 … 4

The fit minimises Σ (F(x) − f(x))² over a grid of the interval: for given b, a is a linear problem (variable projection);
b moves by Levenberg–Marquardt steps from five fixed starts, in form A with b ≥ 0.

Differences from the paper and its code: the paper and its fit have form B, the kernels form A (the fallback without
kernels 1 + Σ |bᵢ| xⁱ, which can be zero), while coefficients are shared: the released ones for GELU miss it by 1.46 in
form A. Here each form has coefficients of its own. |·| has the derivative 1 at 0, as in the kernels, and in both forms:
with 0, as PyTorch's, the identity (b = 0) would never train b.
Complexity: 9 multiplications and one division an element; a fit takes about a tenth of a second. Re-implemented from the
equations (official code: MIT; its kernels: no licence).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.errors import RecipeError

FORMS = ("A", "B")
INTERVAL = (-3.0, 3.0)  # of the paper's fits
ORDERS = (5, 4)
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

    >>> fit_rational(torch.nn.functional.silu).error < 2e-6
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
        powers = scale ** torch.arange(ORDERS[0] + 1, dtype=torch.float64)
        a, b = a / powers, b / powers[1 : ORDERS[1] + 1]
        error = (rational(x, a, b, form) - y).abs().max()
    return RationalFit(tuple(a.tolist()), tuple(b.tolist()), form, float(error))


def _best(problem: _Problem) -> tuple[Tensor, Tensor]:
    starts = [torch.zeros(ORDERS[1], dtype=torch.float64), *torch.eye(ORDERS[1], dtype=torch.float64)]
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
        self.top = x.unsqueeze(1) ** torch.arange(ORDERS[0] + 1)
        self.below = (x.abs() if form == "A" else x).unsqueeze(1) ** torch.arange(1, ORDERS[1] + 1)

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
