"""Start a network well: laws to draw weights from, layers that come with theirs, rows for new tokens.

Functions end in an underscore and fill in place, as those of ``torch.nn.init`` do; start at
:mod:`weft.init.generalized_gaussian`. What they measure first (spectra, graphs, activations) they return.
"""

from weft.init.adjacency import normalized_adjacency
from weft.init.generalized_gaussian import generalized_gaussian_
from weft.init.low_rank import low_rank_
from weft.init.siren import Siren, siren_
from weft.init.virgo import graph_variances, virgo_
from weft.init.winner import SCALE_RULES, ScaleRule, noise_scales, spectral_centroid, winner_

__all__ = [
    "SCALE_RULES",
    "ScaleRule",
    "Siren",
    "generalized_gaussian_",
    "graph_variances",
    "low_rank_",
    "noise_scales",
    "normalized_adjacency",
    "siren_",
    "spectral_centroid",
    "virgo_",
    "winner_",
]
