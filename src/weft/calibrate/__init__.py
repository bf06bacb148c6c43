"""Statistics from data: a walk through a model block by block, and what is gathered on the way.

Start at :mod:`weft.calibrate.walker`.
"""

from weft.calibrate.walker import Block, Walk

__all__ = ["Block", "Walk"]
