"""Fine-tune a model by small functions of its frozen weights.

``weft.adapt_`` (:mod:`weft.adapt.attach`) attaches an adapter, :mod:`weft.adapt.switch` has the verbs for several of
them, :mod:`weft.adapt.folder` those for disk; start at :mod:`weft.adapt.lora` to see what one is.
"""

from weft.adapt.attach import Adapted, adapt_
from weft.adapt.bone import Bone, block_affine, share_shards, unmerge_block_affine
from weft.adapt.compacter import Compacter, CompacterAdapter, PHMLinear, phm_matrix, phm_product
from weft.adapt.eva import EVA, redistribute_ranks
from weft.adapt.folder import LoadedAdapter, SavedAdapter, load_adapter_, restore_adapter_, save_adapter
from weft.adapt.galore import low_rank_basis, projected_groups, projected_state_size
from weft.adapt.gradnormlorp import LowRankProjectedAdamW, LowRankProjection, weight_norm_gradients
from weft.adapt.insert import insert_compacter_, remove_compacter_
from weft.adapt.lora import LoRA
from weft.adapt.mixture_of_shards import MixtureOfShards, draw_shards, gather_shards, unused_shards
from weft.adapt.svfit import SVFit, rank_for_energy, singular_vectors
from weft.adapt.switch import AdapterState, adapters, merge_, remove_, switch_, switched, train_only_, unmerge_
from weft.adapt.task_vectors import TaskVectors
from weft.adapt.token_rows import TokenRows
from weft.adapt.whole import Whole

__all__ = [
    "EVA",
    "Adapted",
    "AdapterState",
    "Bone",
    "Compacter",
    "CompacterAdapter",
    "LoRA",
    "LoadedAdapter",
    "LowRankProjectedAdamW",
    "LowRankProjection",
    "MixtureOfShards",
    "PHMLinear",
    "SVFit",
    "SavedAdapter",
    "TaskVectors",
    "TokenRows",
    "Whole",
    "adapt_",
    "adapters",
    "block_affine",
    "draw_shards",
    "gather_shards",
    "insert_compacter_",
    "load_adapter_",
    "low_rank_basis",
    "merge_",
    "phm_matrix",
    "phm_product",
    "projected_groups",
    "projected_state_size",
    "rank_for_energy",
    "redistribute_ranks",
    "remove_",
    "remove_compacter_",
    "restore_adapter_",
    "save_adapter",
    "share_shards",
    "singular_vectors",
    "switch_",
    "switched",
    "train_only_",
    "unmerge_",
    "unmerge_block_affine",
    "unused_shards",
    "weight_norm_gradients",
]
