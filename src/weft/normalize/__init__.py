"""Normalisations and reparametrisations that make training stable.

Functions of weights (:mod:`weft.normalize.weight_standardization`) are attached with ``weft.parametrize_``; layers
(norms) are modules to build a model from.
"""

from weft.normalize.sigma_reparam import SigmaReparam
from weft.normalize.weight_standardization import WeightStandardization, standardize

__all__ = ["SigmaReparam", "WeightStandardization", "standardize"]
