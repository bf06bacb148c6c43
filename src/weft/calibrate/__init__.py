"""Statistics from data: a walk through a model block by block, and what is gathered on the way.

Start with :func:`weft.calibrate.collect`, which gathers statistics and can write them to a folder, and
:class:`weft.calibrate.Statistics`, which reads them. Methods that change a model block by block use
:func:`weft.calibrate.rewrite` (on disk) and :func:`weft.calibrate.change_model_` (in memory), or walk by themselves:
:mod:`weft.calibrate.walker`. llama.cpp's importance matrices are read and written by :mod:`weft.calibrate.imatrix`.
"""

from weft.calibrate.change_model import change_model_
from weft.calibrate.collect import collect
from weft.calibrate.imatrix import (
    Imatrix,
    imatrix_from_statistics,
    read_imatrix,
    statistics_from_imatrix,
    write_imatrix,
)
from weft.calibrate.rewrite import rewrite
from weft.calibrate.statistics import Statistics
from weft.calibrate.task import BlockTask, Change
from weft.calibrate.walker import Block, Walk

__all__ = [
    "Block",
    "BlockTask",
    "Change",
    "Imatrix",
    "Statistics",
    "Walk",
    "change_model_",
    "collect",
    "imatrix_from_statistics",
    "read_imatrix",
    "rewrite",
    "statistics_from_imatrix",
    "write_imatrix",
]
