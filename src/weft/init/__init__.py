"""Start a network well: laws to draw weights from, layers that come with theirs, rows for new tokens.

Functions end in an underscore and fill in place, as those of ``torch.nn.init`` do; start at
:mod:`weft.init.generalized_gaussian`. What they measure first (spectra, graphs, activations) they return.
"""

from weft.init.constrained_word2vec import constrained_word2vec
from weft.init.cosine import dct, idct, select_modes
from weft.init.generalized_gaussian import generalized_gaussian_
from weft.init.group_rational import GroupRational
from weft.init.kat import GRKAN, activation_gain, gr_kan_variance_preserving_, replace_activations_
from weft.init.mimetic import mimetic_attention_
from weft.init.rational_fit import RationalFit, fit_rational, rational
from weft.init.spectral import SpectralConv, spectral_variance_preserving_
from weft.init.transform_once import TransformOnce, TransformOnceLayer
from weft.init.vocabulary import extend_vocabulary_, hull_violation, replace_vocabulary_

__all__ = [
    "GRKAN",
    "GroupRational",
    "RationalFit",
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
    "hull_violation",
    "idct",
    "mimetic_attention_",
    "rational",
    "replace_activations_",
    "replace_vocabulary_",
    "select_modes",
    "spectral_variance_preserving_",
]
