"""Start a network well: laws to draw weights from, layers that come with theirs, rows for new tokens.

Functions end in an underscore and fill in place, as those of ``torch.nn.init`` do; start at
:mod:`weft.init.generalized_gaussian`. What they measure first (spectra, graphs, activations) they return.
"""

from weft.init.generalized_gaussian import generalized_gaussian_

__all__ = ["generalized_gaussian_"]
