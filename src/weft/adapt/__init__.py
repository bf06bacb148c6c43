"""Fine-tune a model by small functions of its frozen weights, or whole with little optimizer state.

Start at :mod:`weft.adapt.lora`, for the latter at :mod:`weft.adapt.gradnormlorp`.
"""

from weft.adapt.galore import low_rank_basis, projected_groups, projected_state_size
from weft.adapt.gradnormlorp import LowRankProjectedAdamW, LowRankProjection, weight_norm_gradients
from weft.adapt.lora import LoRA

__all__ = [
    "LoRA",
    "LowRankProjectedAdamW",
    "LowRankProjection",
    "low_rank_basis",
    "projected_groups",
    "projected_state_size",
    "weight_norm_gradients",
]
