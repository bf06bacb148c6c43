"""Start a network well: laws to draw weights from, layers that come with theirs, rows for new tokens.

Functions end in an underscore and fill in place, as those of ``torch.nn.init`` do; start at
:mod:`weft.init.generalized_gaussian`. What they measure first (spectra, graphs, activations) they return.
"""

from weft.init.cosine import dct, idct, select_modes
from weft.init.generalized_gaussian import generalized_gaussian_
from weft.init.spectral import SpectralConv, spectral_variance_preserving_
from weft.init.transform_once import TransformOnce, TransformOnceLayer

__all__ = [
    "SpectralConv",
    "TransformOnce",
    "TransformOnceLayer",
    "dct",
    "generalized_gaussian_",
    "idct",
    "select_modes",
    "spectral_variance_preserving_",
]
