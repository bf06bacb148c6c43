"""Patches on trained weights: extract a change, apply it elsewhere, take it off again.

Start at :mod:`weft.edit.rws` (robustness as a patch) and :mod:`weft.edit.extract_lora` (a change as an adapter).
"""

from weft.edit.extract_lora import extract_lora
from weft.edit.low_rank import low_rank
from weft.edit.merge_adapters import merge_adapters
from weft.edit.originals import Originals, restore
from weft.edit.rws import RwsApply, RwsExtract, add_signatures, signature
from weft.edit.weight_patch import WeightPatch

__all__ = [
    "Originals",
    "RwsApply",
    "RwsExtract",
    "WeightPatch",
    "add_signatures",
    "extract_lora",
    "low_rank",
    "merge_adapters",
    "restore",
    "signature",
]
