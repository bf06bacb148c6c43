"""Remove weights that a network can do without.

Start at :mod:`weft.prune.wanda`: a mask from one weight matrix and the norms of its inputs, and :func:`prune_wanda`, which
prunes a model on disk block by block and writes a new folder.
"""

from weft.prune.wanda import Wanda, prune_wanda, wanda_mask

__all__ = ["Wanda", "prune_wanda", "wanda_mask"]
