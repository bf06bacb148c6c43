"""Fine-tune a model by small functions of its frozen weights.

``weft.adapt_`` (:mod:`weft.adapt.attach`) attaches an adapter, :mod:`weft.adapt.switch` has the verbs for several of
them; start at :mod:`weft.adapt.lora` to see what one is.
"""

from weft.adapt.attach import Adapted, adapt_
from weft.adapt.eva import EVA, redistribute_ranks
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
from weft.adapt.token_rows import TokenRows
from weft.adapt.whole import Whole

__all__ = [
    "EVA",
    "Adapted",
    "AdapterState",
    "LoRA",
    "TokenRows",
    "Whole",
    "adapt_",
    "adapters",
    "merge_",
    "redistribute_ranks",
    "remove_",
    "switch_",
    "switched",
    "train_only_",
    "unmerge_",
]
