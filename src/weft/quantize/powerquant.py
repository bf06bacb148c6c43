"""Quantise powers of weights uniformly, with the exponent that gives the least error: no data.

PowerQuant: Automorphism Search for Non-Uniform Quantization, Yvinec et al., arXiv:2301.09858 (ICLR 2023).

    code = round( q · sign(w) (|w| / m)ᵃ )          Ŵ = sign(code) (|code| / q)^{1/a} · m          q = 2ᵇ⁻¹ − 1

W is (out, in), m (out, groups) the largest |w| of a group of inputs of a row. a = 1 is rounding to nearest on a narrow
symmetric grid; a < 1 is finer near zero, as weights with tails like it. The powers are the continuous automorphisms of
(ℝ₊, ×): (|w|ᵃ |x|ᵃ)^{1/a} = |w| |x|. The exponent has the least Σ (W − Ŵ)²: of each row, of a matrix, or of all matrices of
a network (:func:`power_exponent`).

Differences from the paper: what is stored is a table of the 2ᵇ − 1 values and indices into it, as no matrix product takes
powers; weights alone are quantised. Exponents are searched from 0.2 to 1.5, on a grid and finer grids around its best, as the
error has small steps. Those of rows are multiples of 1/100, so that a large matrix has few tables.
Complexity: O(out · in) for each of about 50 exponents.
Re-implemented from the equations (no official code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.calibrate import Change, Statistics
from weft.errors import RecipeError
from weft.function.quantizer import QuantizeMethod
from weft.method import parameter
from weft.packed import Lookup
from weft.quantize.grid import Grid, fit_grid

LEAST, MOST = 0.2, 1.5  # exponents
_STEPS = (0.05, 0.01, 0.002, 0.001)  # of one search after the other
_HUNDREDTHS = 100  # exponents of rows are whole multiples of one over this
UNITS = ("row", "matrix")


@dataclass(frozen=True)
class PowerQuant(Change):
    """Bits, groups, and the exponent.

    >>> PowerQuant(bits=3, exponent=0.5)
    PowerQuant(bits=3, group_size=0, exponent=0.5, unit='matrix')
    """

    bits: int = parameter(4, "bits of a code, its sign among them", minimum=2, maximum=8)
    group_size: int = parameter(0, "inputs that share the largest weight; 0 for whole rows", minimum=0)
    exponent: float = parameter(0.0, "of the weights; 0: the one with the least error is searched", minimum=0)
    unit: str = parameter("matrix", "what has an exponent of its own: row or matrix", choices=UNITS)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.group_size < 0 or self.unit not in UNITS:
            raise RecipeError(
                f"Powers need 2 to 8 bits, a group_size ≥ 0 and the unit {' or '.join(UNITS)}, got bits={self.bits!r}, "
                f"group_size={self.group_size!r} and unit={self.unit!r}."
            )
        if self.exponent and not LEAST <= self.exponent <= MOST:
            raise RecipeError(f"Exponents are {LEAST} to {MOST}, or 0 to search one, got {self.exponent!r}.")

    def fit(self, name: str, weight: Tensor, statistics: Statistics) -> Lookup:
        """A layer's codes; see :class:`weft.calibrate.Change`."""
        return power_codes(weight, self)


def power_levels(exponent: Tensor, bits: int) -> Tensor:
    """sign(i) (|i| / q)^{1/a} for i = −q … q: (n,) exponents -> (n, 2q + 1), float32.

    >>> power_levels(torch.tensor([0.5]), 3).tolist()[0][3:]
    [0.0, 0.1111111119389534, 0.4444444477558136, 1.0]
    """
    q = (1 << (bits - 1)) - 1
    whole = torch.arange(-q, q + 1, device=exponent.device, dtype=torch.float64)
    return (whole.sign() * (whole.abs() / q).pow(1 / exponent.double().unsqueeze(1))).float()


def power_exponent(weights: Tensor | Sequence[Tensor], config: PowerQuant | None = None) -> float:
    """The exponent with the least Σ (W − Ŵ)² over one or several matrices, to 1/1000.

    Args:
        weights: one matrix (out, in), or those of a whole network.
        config: bits and groups; the defaults if None.

    Raises:
        RecipeError: there are none, they are no matrices, do not divide into groups, or are not finite.

    Source: arXiv:2301.09858, equation 5 with p = 2.

    >>> round(power_exponent(torch.linspace(-1, 1, 999).unsqueeze(0)), 1)  # uniform weights need no power
    1.0
    """
    config = config or PowerQuant()
    matrices = [weights] if isinstance(weights, Tensor) else list(weights)
    if not matrices:
        raise RecipeError("An exponent is searched for at least one matrix, got none.")
    parts = [power_parts(w, config) for w in matrices]
    whole = torch.stack([m.amax() for _, m in parts]).amax()

    def error(exponent: Any) -> Tensor:
        return (
            torch.stack([_error(u, _shares(m, whole), exponent, config.bits).sum() for u, m in parts]).sum().reshape(1)
        )

    return float(_search(error, 1)[0])


def power_codes(weight: Tensor, config: PowerQuant | None = None) -> Lookup:
    """Codes, tables and the largest weight of each group.

    Args:
        weight: (out, in).
        config: bits, groups, exponent; the defaults if None.

    Raises:
        RecipeError: it is no matrix, its rows do not divide into groups, or its values are not finite.

    Source: arXiv:2301.09858, equations 3 and 4.

    >>> made = power_codes(torch.tensor([[1.0, -0.25, 0.1]]), PowerQuant(bits=3, exponent=0.5))
    >>> made.codes.tolist(), [round(v, 3) for v in made.dequantize()[0].tolist()]
    ([[6, 1, 4]], [1.0, -0.444, 0.111])
    """
    config = config or PowerQuant()
    unit, largest = power_parts(weight, config)
    exponent = power_exponents(unit, largest, config)
    codes = (unit.sign() * unit.abs().pow(exponent) * code_limit(config.bits)).round()
    return power_lookup(codes, largest, exponent, config)


def code_limit(bits: int) -> int:
    """q, the largest code.

    >>> code_limit(4)
    7
    """
    return (1 << (bits - 1)) - 1


def power_parts(weight: Tensor, config: PowerQuant) -> tuple[Tensor, Tensor]:
    """Weights as shares of the largest of their group (out, groups, group_size), and that (out, groups, 1).

    >>> [t.tolist() for t in power_parts(torch.tensor([[2.0, -1.0]]), PowerQuant())]
    [[[[1.0, -0.5]]], [[[2.0]]]]
    """
    fit_grid(weight, Grid(8, config.group_size, "narrow"))  # checks the weight
    w = weight.detach().float().contiguous()
    groups = w.unflatten(1, (-1, config.group_size or w.shape[1]))
    largest = groups.abs().amax(-1, keepdim=True)
    # a group of zeros: 0 / 1; dividing by numbers below the smallest normal one would overflow
    return groups / torch.where(largest > 0, largest.clamp(min=torch.finfo(torch.float32).tiny), 1), largest


def _error(unit: Tensor, share: Tensor, exponent: Any, bits: int) -> Tensor:
    """Σ (W − Ŵ)² of each row: (out,), float64; ``share`` (out, groups, 1) is what stands for the largest weights."""
    q = code_limit(bits)
    codes = (unit.abs().pow(exponent) * q).round() / q
    return ((codes.pow(1 / exponent) - unit.abs()).double() * share).square().sum((1, 2))


def _shares(largest: Tensor, whole: Tensor) -> Tensor:
    """Float64, so that squares of tiny weights do not vanish."""
    return (largest / whole.clamp(min=torch.finfo(torch.float32).tiny)).double()


def power_exponents(unit: Tensor, largest: Tensor, config: PowerQuant) -> Tensor:
    """Those given or searched, (out, 1, 1) or (1, 1, 1), float32, for what :func:`power_parts` gives.

    >>> power_exponents(*power_parts(torch.ones(2, 4), PowerQuant()), PowerQuant(exponent=0.5)).flatten().tolist()
    [0.5]
    """
    rows = len(unit) if config.unit == "row" else 1
    share = _shares(largest, largest.amax())
    if config.exponent:
        found = torch.full((rows,), config.exponent, device=unit.device)
    elif rows == 1:
        found = _search(lambda a: _error(unit, share, a, config.bits).sum().reshape(1), 1).to(unit.device)
    else:
        found = _search(lambda a: _error(unit, share, a.to(unit.device), config.bits), rows).to(unit.device)
    found = found.float()
    return (on_grid(found) if config.unit == "row" else found).reshape(-1, 1, 1)


def on_grid(exponent: Tensor) -> Tensor:
    """The nearest multiples of 1/100.

    >>> round(on_grid(torch.tensor(0.4567)).item(), 4)
    0.46
    """
    return (exponent * _HUNDREDTHS).round() / _HUNDREDTHS


def _search(error: Callable[[Any], Tensor], units: int) -> Tensor:
    """The best exponents, (units,) float64: on a coarse grid, then around its best on finer ones.

    The error has small steps where a weight changes its code, so that a golden section alone may stop at one of them.
    """
    best = torch.ones(units, dtype=torch.float64)
    least = torch.full_like(best, torch.inf)
    tried = [
        torch.full((units,), LEAST + _STEPS[0] * i, dtype=torch.float64)
        for i in range(round((MOST - LEAST) / _STEPS[0]) + 1)
    ]
    for step, before in zip((*_STEPS[1:], 0.0), _STEPS):
        for a in tried:
            found = error(a.float().reshape(-1, 1, 1) if units > 1 else float(a[0])).cpu()
            best = torch.where(found < least, a, best)
            least = torch.minimum(found, least)
        if not step:
            break
        reach = round(before / step)
        middle = best.clone()
        tried = [(middle + step * i).clamp(LEAST, MOST) for i in range(-reach, reach + 1) if i]
    return (best * 1000).round() / 1000


def power_lookup(codes: Tensor, largest: Tensor, exponent: Tensor, config: PowerQuant) -> Lookup:
    """Codes −q … q (out, groups, group_size) and exponents as tables.

    >>> power_lookup(torch.tensor([[[0.0, 7.0]]]), torch.ones(1, 1, 1), torch.ones(1, 1, 1), PowerQuant()).codes.tolist()
    [[7, 14]]
    """
    size = codes.shape[2]
    made = (codes + code_limit(config.bits)).to(torch.uint8).flatten(1)
    if exponent.numel() == 1:
        return Lookup(made, power_levels(exponent.flatten(), config.bits), largest.flatten(), size)
    exponents, table = exponent.flatten().unique(return_inverse=True)
    return Lookup(made, power_levels(exponents, config.bits), largest.flatten(), size, table=table.to(torch.uint8))


METHODS = (
    QuantizeMethod(
        name="powerquant",
        family="quantize",
        config=PowerQuant,
        summary="Quantise powers of weights uniformly, with the exponent of least error; no data.",
        goal="shrink",
        paper="nupes",
        checked_by=("brute force",),
        codes=lambda config: (0, (1 << config.bits) - 2),
        error=0.122,
        finer={"bits": (2, 3, 4, 8)},
        refits="the exponent is searched anew",
    ),
)
