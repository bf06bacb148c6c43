"""Several models in, one model out. Start at :mod:`weft.merge.linear`; :mod:`weft.merge.ties` shows global thresholds.

Each method is a function on tensors and a configuration (``weft.merge.ties``, ``weft.merge.Ties``). On files use
``weft.run`` or the command line.
"""

from weft.merge.arcee_fusion import ArceeFusion, arcee_fusion
from weft.merge.breadcrumbs import Breadcrumbs, breadcrumbs
from weft.merge.dare import Dare, dare
from weft.merge.della import Della, della
from weft.merge.karcher import Karcher, karcher
from weft.merge.linear import Linear, linear
from weft.merge.model_stock import ModelStock, model_stock
from weft.merge.multislerp import Multislerp, multislerp
from weft.merge.nearswap import Nearswap, nearswap
from weft.merge.nuslerp import Nuslerp, nuslerp
from weft.merge.passthrough import Passthrough, passthrough
from weft.merge.pcb import Pcb, pcb
from weft.merge.ram import Ram, RamPlus, ram, ramplus
from weft.merge.sce import Sce, sce
from weft.merge.slerp import Slerp, slerp
from weft.merge.soups import GreedySoup, UniformSoup, greedy_soup, select_greedily, uniform_soup
from weft.merge.sparse_soups import SparseSoup, enforce_masks, phase_sparsity, sparse_soup
from weft.merge.task_arithmetic import TaskArithmetic, task_arithmetic
from weft.merge.ties import Ties, ties
from weft.merge.variance_corrected import VarianceCorrected, variance_corrected
from weft.merge.wise_ft import WiseFt, interpolation_path, wise_ft

__all__ = [
    "ArceeFusion",
    "Breadcrumbs",
    "Dare",
    "Della",
    "GreedySoup",
    "Karcher",
    "Linear",
    "ModelStock",
    "Multislerp",
    "Nearswap",
    "Nuslerp",
    "Passthrough",
    "Pcb",
    "Ram",
    "RamPlus",
    "Sce",
    "Slerp",
    "SparseSoup",
    "TaskArithmetic",
    "Ties",
    "UniformSoup",
    "VarianceCorrected",
    "WiseFt",
    "arcee_fusion",
    "breadcrumbs",
    "dare",
    "della",
    "enforce_masks",
    "greedy_soup",
    "interpolation_path",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "pcb",
    "phase_sparsity",
    "ram",
    "ramplus",
    "sce",
    "select_greedily",
    "slerp",
    "sparse_soup",
    "task_arithmetic",
    "ties",
    "uniform_soup",
    "variance_corrected",
    "wise_ft",
]
