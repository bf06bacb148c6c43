"""Fine-tune a model by small functions of its frozen weights.

``weft.adapt_`` (:mod:`weft.adapt.attach`) attaches an adapter, :mod:`weft.adapt.switch` has the verbs for several of
them; start at :mod:`weft.adapt.lora` to see what one is.
"""

from weft.adapt.attach import Adapted, adapt_
from weft.adapt.compacter import Compacter, CompacterAdapter, PHMLinear, phm_matrix, phm_product
from weft.adapt.eva import EVA, redistribute_ranks
from weft.adapt.insert import insert_compacter_, remove_compacter_
from weft.adapt.lora import LoRA
from weft.adapt.switch import (
    AdapterState,
    adapters,
    merge_,
    remove_,
    switch_,
    switched,
    train_only_,
    unmerge_,
)
from weft.adapt.task_vectors import TaskVectors
from weft.adapt.token_rows import TokenRows
from weft.adapt.whole import Whole

__all__ = [
    "EVA",
    "Adapted",
    "AdapterState",
    "Compacter",
    "CompacterAdapter",
    "LoRA",
    "PHMLinear",
    "TaskVectors",
    "TokenRows",
    "Whole",
    "adapt_",
    "adapters",
    "insert_compacter_",
    "merge_",
    "phm_matrix",
    "phm_product",
    "redistribute_ranks",
    "remove_",
    "remove_compacter_",
    "switch_",
    "switched",
    "train_only_",
    "unmerge_",
]
