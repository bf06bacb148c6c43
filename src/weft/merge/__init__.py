"""Several models in, one model out. Start at :mod:`weft.merge.linear`; :mod:`weft.merge.ties` shows global thresholds.

Each method is a function on tensors and a configuration (``weft.merge.ties``, ``weft.merge.Ties``). On files use
``weft.run`` or the command line.

Models that were trained apart need ``align`` first: :mod:`weft.merge.weight_matching` puts the units of one into the order
of the other. These functions load torch, so they are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weft.merge.arcee_fusion import ArceeFusion, arcee_fusion
from weft.merge.breadcrumbs import Breadcrumbs, breadcrumbs
from weft.merge.dare import Dare, dare
from weft.merge.della import Della, della
from weft.merge.karcher import Karcher, karcher
from weft.merge.linear import Linear, linear
from weft.merge.model_stock import ModelStock, model_stock
from weft.merge.multislerp import Multislerp, multislerp
from weft.merge.nearswap import Nearswap, nearswap
from weft.merge.nuslerp import Nuslerp, nuslerp
from weft.merge.passthrough import Passthrough, passthrough
from weft.merge.pcb import Pcb, pcb
from weft.merge.ram import Ram, RamPlus, ram, ramplus
from weft.merge.sce import Sce, sce
from weft.merge.slerp import Slerp, slerp
from weft.merge.soups import GreedySoup, UniformSoup, greedy_soup, select_greedily, uniform_soup
from weft.merge.sparse_soups import SparseSoup, enforce_masks, phase_sparsity, sparse_soup
from weft.merge.task_arithmetic import TaskArithmetic, task_arithmetic
from weft.merge.ties import Ties, ties
from weft.merge.variance_corrected import VarianceCorrected, variance_corrected
from weft.merge.weight_matching import ActivationMatching, StraightThroughMatching, WeightMatching
from weft.merge.wise_ft import WiseFt, interpolation_path, wise_ft

if TYPE_CHECKING:
    from weft.merge.weight_matching import Barrier as Barrier
    from weft.merge.weight_matching import Matching as Matching
    from weft.merge.weight_matching import MatchReport as MatchReport
    from weft.merge.weight_matching import StraightThrough as StraightThrough
    from weft.merge.weight_matching import align as align
    from weft.merge.weight_matching import loss_barrier as loss_barrier
    from weft.merge.weight_matching import match_activations as match_activations
    from weft.merge.weight_matching import match_many as match_many
    from weft.merge.weight_matching import match_report as match_report
    from weft.merge.weight_matching import match_straight_through as match_straight_through
    from weft.merge.weight_matching import match_weights as match_weights
    from weft.merge.weight_matching import reset_batch_norm_ as reset_batch_norm_
    from weft.merge.weight_matching import singular_alignment as singular_alignment

# these need torch
_ON_USE = (
    "Barrier",
    "MatchReport",
    "Matching",
    "StraightThrough",
    "align",
    "loss_barrier",
    "match_activations",
    "match_many",
    "match_report",
    "match_straight_through",
    "match_weights",
    "reset_batch_norm_",
    "singular_alignment",
)

__all__ = [
    "ActivationMatching",
    "ArceeFusion",
    "Barrier",
    "Breadcrumbs",
    "Dare",
    "Della",
    "GreedySoup",
    "Karcher",
    "Linear",
    "MatchReport",
    "Matching",
    "ModelStock",
    "Multislerp",
    "Nearswap",
    "Nuslerp",
    "Passthrough",
    "Pcb",
    "Ram",
    "RamPlus",
    "Sce",
    "Slerp",
    "SparseSoup",
    "StraightThrough",
    "StraightThroughMatching",
    "TaskArithmetic",
    "Ties",
    "UniformSoup",
    "VarianceCorrected",
    "WeightMatching",
    "WiseFt",
    "align",
    "arcee_fusion",
    "breadcrumbs",
    "dare",
    "della",
    "enforce_masks",
    "greedy_soup",
    "interpolation_path",
    "karcher",
    "linear",
    "loss_barrier",
    "match_activations",
    "match_many",
    "match_report",
    "match_straight_through",
    "match_weights",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "pcb",
    "phase_sparsity",
    "ram",
    "ramplus",
    "reset_batch_norm_",
    "sce",
    "select_greedily",
    "singular_alignment",
    "slerp",
    "sparse_soup",
    "task_arithmetic",
    "ties",
    "uniform_soup",
    "variance_corrected",
    "wise_ft",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_USE:
        from weft.errors import did_you_mean

        raise AttributeError(f"module 'weft.merge' has no attribute {name!r}.{did_you_mean(name, __all__)}")
    value = getattr(importlib.import_module("weft.merge.weight_matching"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
