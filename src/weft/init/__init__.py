"""Start a network well: laws to draw weights from, layers that come with theirs, rows for new tokens.

Functions end in an underscore and fill in place, as those of ``torch.nn.init`` do; start at
:mod:`weft.init.generalized_gaussian`. What they measure first (spectra, graphs, activations) they return.
"""

from weft.init.constrained_word2vec import constrained_word2vec
from weft.init.generalized_gaussian import generalized_gaussian_
from weft.init.vocabulary import extend_vocabulary_, hull_violation, replace_vocabulary_

__all__ = [
    "constrained_word2vec",
    "extend_vocabulary_",
    "generalized_gaussian_",
    "hull_violation",
    "replace_vocabulary_",
]
