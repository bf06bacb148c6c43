"""Fine-tune a model by small functions of its frozen weights.

``weft.adapt_`` (:mod:`weft.adapt.attach`) attaches an adapter, :mod:`weft.adapt.switch` has the verbs for several of
them, :mod:`weft.adapt.folder` those for disk; start at :mod:`weft.adapt.lora` to see what one is.
"""

from weft.adapt.attach import Adapted, adapt_
from weft.adapt.bone import Bone, block_affine, share_shards, unmerge_block_affine
from weft.adapt.folder import LoadedAdapter, SavedAdapter, load_adapter_, save_adapter
from weft.adapt.lora import LoRA
from weft.adapt.mixture_of_shards import MixtureOfShards, draw_shards, gather_shards, unused_shards
from weft.adapt.svfit import SVFit, rank_for_energy, singular_vectors
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
    "Adapted",
    "AdapterState",
    "Bone",
    "LoRA",
    "LoadedAdapter",
    "MixtureOfShards",
    "SVFit",
    "SavedAdapter",
    "TokenRows",
    "Whole",
    "adapt_",
    "adapters",
    "block_affine",
    "draw_shards",
    "gather_shards",
    "load_adapter_",
    "merge_",
    "rank_for_energy",
    "remove_",
    "save_adapter",
    "share_shards",
    "singular_vectors",
    "switch_",
    "switched",
    "train_only_",
    "unmerge_",
    "unmerge_block_affine",
    "unused_shards",
]
