"""Several models in, one model out. Start at :mod:`weft.merge.linear`; :mod:`weft.merge.ties` shows global thresholds.

Each method is a function on tensors and a configuration (``weft.merge.ties``, ``weft.merge.Ties``). On files use
``weft.run`` or the command line.
"""

from weft.merge.linear import Linear, linear
from weft.merge.ties import Ties, ties

__all__ = ["Linear", "Ties", "linear", "ties"]
