"""Every alignment keeps the contract."""

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from weft.contract import run_battery
from weft.contract.alignments import CHECKS, run
from weft.errors import WeftError
from weft.merge import match_activations
from weft.registry import methods
from weft.symmetry.alignment import AlignMethod

NUMBER_OF_CHECKS = 17
ROWS = {name: row for name, row in methods().items() if isinstance(row, AlignMethod)}


def test_rows() -> None:
    assert set(ROWS) == {"activation_matching", "straight_through_matching", "weight_matching"}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_contract(name: str) -> None:
    results = run_battery(ROWS[name])
    assert len(results) == NUMBER_OF_CHECKS
    assert [r for r in results if r["outcome"] != "passed"] == []


# a defect for each check


def found(permutations: Any) -> Any:
    return SimpleNamespace(permutations=permutations)


def drops_a_group(a, b, symmetry, batches, *, restarts=1, seed=0):
    permutations = match_activations(a, b, symmetry, batches).permutations
    return found(dict(list(permutations.items())[1:]))


def off_by_one(a, b, symmetry, batches, *, restarts=1, seed=0):
    permutations = match_activations(a, b, symmetry, batches).permutations
    return found({n: np.roll(p, 1, -1) for n, p in permutations.items()})


def moves_nothing(a, b, symmetry, batches, *, restarts=1, seed=0):
    return found(symmetry.identity())


def draws_globally(a, b, symmetry, batches, *, restarts=1, seed=0):
    return match_activations(a, b, symmetry, batches, seed=int(torch.randint(9, ())))


def changes_the_model(a, b, symmetry, batches, *, restarts=1, seed=0):
    result = match_activations(a, b, symmetry, batches)
    next(b.parameters()).data.add_(1)
    return result


def stays_in_evaluation(a, b, symmetry, batches, *, restarts=1, seed=0):
    return match_activations(a.eval(), b, symmetry, batches)


def switches_gradients_on(a, b, symmetry, batches, *, restarts=1, seed=0):
    result = match_activations(a, b, symmetry, batches)
    torch.set_grad_enabled(True)
    return result


def knows_float32_only(a, b, symmetry, batches, *, restarts=1, seed=0):
    plain = next(a.parameters()).dtype == torch.float32
    return match_activations(a, b, symmetry, batches) if plain else found(symmetry.identity())


def lets_all_through(a, b, symmetry, batches, *, restarts=1, seed=0):
    try:
        return match_activations(a, b, symmetry, batches)
    except WeftError:
        return found(symmetry.identity())


def mends_weights(a, b, symmetry, batches, *, restarts=1, seed=0):
    models = copy.deepcopy([a, b])
    for model in models:
        for value in model.parameters():
            value.data.nan_to_num_(posinf=1)
    return match_activations(*models, symmetry, batches)


def finds_what_is_not_there(a, b, symmetry, batches, *, restarts=1, seed=0):
    return found({"none": np.arange(3)})


def takes_any_option(a, b, symmetry, batches, *, restarts=1, seed=0):
    return match_activations(a, b, symmetry, batches, restarts=max(restarts, 1))


def has_other_defaults(a, b, symmetry, batches, *, restarts=2, seed=0):
    return match_activations(a, b, symmetry, batches)


DEFECTS: dict[str, Callable[..., Any]] = {
    "a permutation of every group": drops_a_group,
    "a planted order is recovered": moves_nothing,
    "the function is kept": moves_nothing,
    "equal models stay in their order": off_by_one,
    "equal units stay in their order": off_by_one,
    "repeats itself, without global randomness": draws_globally,
    "models and data are left as they are": changes_the_model,
    "training mode does not matter, and stays": stays_in_evaluation,
    "gradients may be on or off": switches_gradients_on,
    "float64 and half precision": knows_float32_only,
    "models of another form are refused": lets_all_through,
    "NaN and infinity are refused": mends_weights,
    "data that says nothing is refused": lets_all_through,
    "a model without units has no permutations": finds_what_is_not_there,
    "wrong options are refused": takes_any_option,
    "configuration round trip": has_other_defaults,
    "documented": takes_any_option,
}


def test_every_check_has_a_defect() -> None:
    assert set(DEFECTS) == set(CHECKS)


@pytest.mark.parametrize("check", list(DEFECTS))
def test_every_check_finds_its_defect(check: str) -> None:
    row = dataclasses.replace(ROWS["activation_matching"], load=lambda: DEFECTS[check])
    (result,) = [r for r in run(row) if r["check"] == check]
    assert result["outcome"] == "failed"
    assert "Error: " not in result["reason"], "it crashed"


def test_what_crashes_has_failed() -> None:
    row = dataclasses.replace(ROWS["weight_matching"], load=lambda: None)
    assert {r["outcome"] for r in run(row)[:5]} == {"failed"}
