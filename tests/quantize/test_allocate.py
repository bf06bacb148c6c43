"""The allocator against brute force, and what holds for every budget."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from weft.errors import RecipeError
from weft.quantize import allocate_bits, frontier

BITS = (2, 3, 4, 8)


def problem(layers: int, seed: int) -> tuple[dict[str, dict[str, tuple[float, float]]], dict[str, int]]:
    """Curves that need not fall with the bits, of layers of different sizes, scales included."""
    rng = random.Random(seed)
    sizes = {f"l{i}": rng.choice((64, 96, 100, 256)) for i in range(layers)}
    curves = {
        name: {
            str(b): (b + 16 / rng.choice((16, 32)), rng.expovariate(1) * 4.0 ** -(rng.uniform(0.2, 1) ** b))
            for b in BITS
        }
        for name in sizes
    }
    return curves, sizes


def every(
    curves: dict[str, dict[str, tuple[float, float]]], sizes: dict[str, int], groups: list[tuple[str, ...]]
) -> list[tuple[int, float, dict[str, str]]]:
    """All choices: bytes, error, labels."""
    found = []
    for labels in itertools.product(map(str, BITS), repeat=len(groups)):
        choice = {name: label for group, label in zip(groups, labels) for name in group}
        nbytes = sum(math.ceil(curves[n][label][0] * sizes[n] / 8) for n, label in choice.items())
        found.append((nbytes, math.fsum(curves[n][label][1] for n, label in choice.items()), choice))
    return found


@pytest.mark.parametrize("layers", [1, 2, 4, 6])
@pytest.mark.parametrize("grouped", [False, True])
def test_brute_force(layers: int, grouped: bool) -> None:
    for seed in range(4):
        curves, sizes = problem(layers, seed)
        names = list(curves)
        groups = [tuple(names[:3]), *((n,) for n in names[3:])] if grouped else [(n,) for n in names]
        together = [g for g in groups if len(g) > 1]
        choices = every(curves, sizes, groups)
        least, most = min(c[0] for c in choices), max(c[0] for c in choices)
        front = frontier(curves, sizes, together=together)
        last = math.inf
        for step in range(12):
            budget = least + (most - least) * step / 11
            found = allocate_bits(curves, sizes, budget, together=together)
            best = min(error for nbytes, error, _ in choices if nbytes <= budget)
            assert found.error == pytest.approx(best, rel=1e-12)
            assert found.nbytes <= budget
            assert found.error <= last
            assert any(c == found.choices and n == found.nbytes for n, _, c in choices)
            assert front.best(budget).error == found.error
            last = found.error
        assert front.slack == 0
        with pytest.raises(RecipeError, match=f"least possible is {least:,} bytes"):
            allocate_bits(curves, sizes, least - 1, together=together)


def test_a_front_that_is_cut_keeps_its_promise() -> None:
    rng = random.Random(3)
    curves = {
        f"l{i}": {str(b): (b * 1000 + rng.random() * 997, 4.0**-b * rng.uniform(0.1, 5)) for b in BITS}
        for i in range(40)
    }
    exact, cut = frontier(curves, limit=10**7), frontier(curves, limit=200)
    assert exact.slack == 0 < cut.slack
    assert len(cut) <= 201 < len(exact)
    assert cut.nbytes[0] == exact.nbytes[0]
    assert cut.errors[-1] == pytest.approx(exact.errors[-1])
    for budget in (105_000, 130_000, 200_000, 290_000):
        mine, best, bound = cut.best(budget), exact.best(budget), exact.best(max(budget - cut.slack, exact.nbytes[0]))
        assert mine.nbytes == sum(math.ceil(curves[n][label][0]) for n, label in mine.choices.items()) <= budget
        assert best.error <= mine.error <= bound.error


def test_it_is_no_worse_than_one_choice_for_all() -> None:
    curves, sizes = problem(6, 9)
    for label in map(str, BITS):
        budget = sum(math.ceil(curves[n][label][0] * sizes[n] / 8) for n in sizes)
        assert allocate_bits(curves, sizes, budget).error <= math.fsum(c[label][1] for c in curves.values()) + 1e-12


def test_bits_per_weight_count_scales() -> None:
    found = allocate_bits({"a": {"4": (4.5, 1.0)}}, {"a": 64}, 36)
    assert (found.nbytes, found.bits_per_weight) == (36, 4.5)
    with pytest.raises(RecipeError, match=r"4\.5 bits per weight"):
        allocate_bits({"a": {"4": (4.5, 1.0)}}, {"a": 64}, 35)


def test_candidates_without_an_error_are_not_taken() -> None:
    curves = {"a": {"2": (1, math.nan), "4": (2, 3.0)}, "b": {"2": (1, 5.0), "4": (2, math.inf)}}
    assert allocate_bits(curves, None, 100).choices == {"a": "4", "b": "2"}
    with pytest.raises(RecipeError, match=r"a, b: no candidate has a finite error for all of them"):
        allocate_bits(curves, None, 100, together=[("a", "b")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, None, 1), "nothing to choose"),
        (({"a": {}}, None, 1), "no candidate has a finite error"),
        (({"a": {"4": (-1, 1.0)}}, None, 1), "negative size"),
        (({"a": {"4": (1, 1.0)}}, {"b": 3}, 1), "number of weights is not given"),
        (({"a": {"4": (1, 1.0)}}, None, math.nan), "nan"),
    ],
)
def test_what_cannot_be(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        allocate_bits(*arguments)  # type: ignore[arg-type]


def test_groups_that_cannot_be() -> None:
    curves = {"ab": {"4": (1, 1.0)}, "cd": {"4": (1, 1.0)}}
    with pytest.raises(RecipeError, match="Did you mean ab"):
        allocate_bits(curves, None, 9, together=[("abc",)])
    with pytest.raises(RecipeError, match="two groups"):
        allocate_bits(curves, None, 9, together=[("ab",), ("ab", "cd")])


def test_a_large_network_is_a_moment() -> None:
    """224 layers of 7 shapes, every budget."""
    rng = random.Random(0)
    sizes = {f"{i}.{k}": s for i in range(32) for k, s in enumerate((16, 4, 4, 16, 56, 56, 56))}
    curves = {n: {str(b): ((b + 0.25) * s * 2**17, 4.0**-b * rng.random()) for b in BITS} for n, s in sizes.items()}
    front = frontier(curves)
    assert front.slack == 0
    assert len(front) > 1000
    points = front.points(50)
    assert len(points) <= 50
    assert points[0][0] == front.nbytes[0]
    assert points[-1][0] == front.nbytes[-1]
    assert points == sorted(points)
