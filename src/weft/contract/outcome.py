"""One check on one row, and what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from weft.errors import RecipeError, WeftError
from weft.method import Method

Row = TypeVar("Row")


def outcome(name: str, check: Callable[[Row], None], method: Row, expected: str = "") -> dict[str, str]:
    """Run a check from the same random state each time; what crashes has failed, and the battery goes on.

    Args:
        name: of the check.
        check: raises if the promise is broken.
        method: the registry row.
        expected: why the row cannot keep this promise; the check is then not run.

    Returns:
        Its name, "passed", "failed" or "expected", and the reason for the latter two.

    >>> outcome("a promise", lambda row: None, "row")
    {'check': 'a promise', 'outcome': 'passed', 'reason': ''}
    """
    if expected:
        return {"check": name, "outcome": "expected", "reason": expected}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # torch 2.13 warns about itself when it traces an autograd function
            warnings.filterwarnings("ignore", message=".*should not be instantiated.*", category=DeprecationWarning)
            torch.manual_seed(0)
            check(method)
    except (AssertionError, WeftError) as error:
        return {"check": name, "outcome": "failed", "reason": str(error) or type(error).__name__}
    except Exception as error:
        return {"check": name, "outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {"check": name, "outcome": "passed", "reason": ""}


def adder(checks: dict[str, Any]) -> Callable[[str], Callable[[Callable[[Any], None]], Callable[[Any], None]]]:
    """A decorator that adds a check to a battery under its name.

    >>> checks = {}
    >>> @adder(checks)("a promise")
    ... def _promise(row):
    ...     pass
    >>> list(checks)
    ['a promise']
    """

    def named(name: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
        def add(function: Callable[[Any], None]) -> Callable[[Any], None]:
            checks[name] = function
            return function

        return add

    return named


def answers_typos(method: Method) -> None:
    """Assert that a parameter's name with a letter too many is refused, with the right name in the message."""
    for key in method.parameters:
        try:
            method.configure({key + "x": 1})
        except RecipeError as error:
            assert key in str(error), f"the message does not name {key}: {error}"
        else:
            raise AssertionError(f"the unknown parameter {key}x was accepted")
