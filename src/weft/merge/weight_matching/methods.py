"""Registry rows of matching and their configurations; the functions, which load torch, are imported when they are used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from weft.method import parameter
from weft.symmetry.alignment import INPUTS, INPUTS_AND_TARGETS, AlignMethod


@dataclass(frozen=True)
class WeightMatching:
    """How long :func:`match_weights` looks.

    >>> WeightMatching(restarts=4)
    WeightMatching(restarts=4, max_sweeps=100)
    """

    restarts: int = parameter(1, "descents; all but the first start from a random order, the best is kept", minimum=1)
    max_sweeps: int = parameter(100, "most sweeps over all groups, for each descent", minimum=1)


@dataclass(frozen=True)
class ActivationMatching:
    """How long :func:`match_activations` looks.

    >>> ActivationMatching()
    ActivationMatching(restarts=1)
    """

    restarts: int = parameter(1, "descents; all but the first start from a random order, the best is kept", minimum=1)


@dataclass(frozen=True)
class StraightThroughMatching:
    """How :func:`match_straight_through` trains the order.

    >>> StraightThroughMatching(learning_rate=0.1)
    StraightThroughMatching(learning_rate=0.1, momentum=0.9, max_sweeps=100)
    """

    learning_rate: float = parameter(0.01, "of the free parameters that the order follows", minimum=0)
    momentum: float = parameter(0.9, "of the free parameters that the order follows", minimum=0)
    max_sweeps: int = parameter(100, "most sweeps over all groups, for each step's matching", minimum=1)


def _public(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(importlib.import_module("weft.merge"), name)
    return found


METHODS = (
    AlignMethod(
        name="weight_matching",
        family="merge",
        config=WeightMatching,
        summary="Put the units of one model into the order in which its weights are nearest to another's.",
        goal="combine",
        paper="weight-matching",
        origin="Git Re-Basin, arXiv:2209.04836",
        checked_by=("brute force", "closed form"),
        load=partial(_public, "match_weights"),
        on_folders=True,
    ),
    AlignMethod(
        name="activation_matching",
        family="merge",
        config=ActivationMatching,
        summary="Put the units of one model into the order in which its activations correlate most with another's.",
        goal="combine",
        origin="Li et al. 2015, arXiv:1511.07543; Git Re-Basin, arXiv:2209.04836",
        needs="calibration",
        checked_by=("numpy",),
        load=partial(_public, "match_activations"),
        data=INPUTS,
    ),
    AlignMethod(
        name="straight_through_matching",
        family="merge",
        config=StraightThroughMatching,
        summary="Put the units of one model into an order that is trained to lower the loss of its average with another.",
        goal="combine",
        origin="Git Re-Basin, arXiv:2209.04836",
        needs="gradients",
        checked_by=("independent reference",),
        load=partial(_public, "match_straight_through"),
        data=INPUTS_AND_TARGETS,
    ),
)
