"""Remove weights that a network can do without.

Start at :mod:`weft.prune.wanda`: a mask from one weight matrix and the norms of its inputs, and :func:`prune_wanda`, which
prunes a model on disk block by block and writes a new folder. :mod:`weft.prune.magnitude` needs no data.
"""

from weft.prune.magnitude import Magnitude, magnitude_mask, prune_magnitude
from weft.prune.wanda import Wanda, prune_wanda, wanda_mask

__all__ = ["Magnitude", "Wanda", "magnitude_mask", "prune_magnitude", "prune_wanda", "wanda_mask"]
