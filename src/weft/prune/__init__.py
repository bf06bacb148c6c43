"""Remove weights that a network can do without.

Start at :mod:`weft.prune.wanda`: a mask from one weight matrix and the norms of its inputs; :mod:`weft.prune.magnitude` needs no
data. :func:`prune_` prunes a model in memory, :func:`prune_model` writes a pruned copy of one on disk.
"""

from weft.prune.magnitude import Magnitude, magnitude_mask
from weft.prune.run import prune_, prune_model
from weft.prune.wanda import Wanda, wanda_mask

__all__ = ["Magnitude", "Wanda", "magnitude_mask", "prune_", "prune_model", "wanda_mask"]
