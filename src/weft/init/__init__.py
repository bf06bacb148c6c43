"""Start a network well: laws to draw weights from, layers that come with theirs, rows for new tokens.

Functions end in an underscore and fill in place, as those of ``torch.nn.init`` do; start at
:mod:`weft.init.generalized_gaussian`. What they measure first (spectra, graphs, activations) they return.
"""

from weft.init.adjacency import normalized_adjacency
from weft.init.constrained_word2vec import constrained_word2vec
from weft.init.cosine import dct, idct, select_modes
from weft.init.generalized_gaussian import generalized_gaussian_
from weft.init.group_rational import GroupRational
from weft.init.kat import GRKAN, activation_gain, gr_kan_variance_preserving_, replace_activations_
from weft.init.low_rank import low_rank_
from weft.init.mimetic import mimetic_attention_
from weft.init.rational_fit import RationalFit, fit_rational, rational
from weft.init.siren import Siren, siren_
from weft.init.spectral import SpectralConv, spectral_variance_preserving_
from weft.init.transform_once import TransformOnce, TransformOnceLayer
from weft.init.virgo import graph_variances, virgo_
from weft.init.vocabulary import extend_vocabulary_, hull_violation, replace_vocabulary_
from weft.init.winner import SCALE_RULES, ScaleRule, noise_scales, spectral_centroid, winner_

__all__ = [
    "GRKAN",
    "SCALE_RULES",
    "GroupRational",
    "RationalFit",
    "ScaleRule",
    "Siren",
    "SpectralConv",
    "TransformOnce",
    "TransformOnceLayer",
    "activation_gain",
    "constrained_word2vec",
    "dct",
    "extend_vocabulary_",
    "fit_rational",
    "generalized_gaussian_",
    "gr_kan_variance_preserving_",
    "graph_variances",
    "hull_violation",
    "idct",
    "low_rank_",
    "mimetic_attention_",
    "noise_scales",
    "normalized_adjacency",
    "rational",
    "replace_activations_",
    "replace_vocabulary_",
    "select_modes",
    "siren_",
    "spectral_centroid",
    "spectral_variance_preserving_",
    "virgo_",
    "winner_",
]
