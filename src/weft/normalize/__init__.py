"""Normalisations and reparametrisations that make training stable.

Functions of weights (:mod:`weft.normalize.weight_standardization`) are attached with ``weft.parametrize_``; layers
(norms) are modules to build a model from; some fold into the next linear layer after training (``fuse_``).
"""

from weft.normalize.adaptive_clipping import clip_grad_adaptive_
from weft.normalize.attention_entropy import (
    EntropyMonitor,
    attention_entropy,
    attention_entropy_bound,
    logit_deviation,
)
from weft.normalize.batch_channel_norm import BatchChannelNorm2d, EstimatedBatchNorm2d
from weft.normalize.centered import CenteredEmbedding, CenteredLayerNorm, RestoringCRMSNorm
from weft.normalize.convert import (
    convert_ghost_batch_norm_,
    convert_layer_norm_cells_,
    layer_norm_gru_cell,
    layer_norm_lstm_cell,
)
from weft.normalize.convert_norms import ConvertedNorms, convert_to_crms_, convert_to_rms_
from weft.normalize.crms_norm import CRMSNorm, crms_norm, drop_input, restore_feature
from weft.normalize.fold import fold_affine, fold_into_
from weft.normalize.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, adapt_regime, scale_learning_rate
from weft.normalize.layer_norm import LayerNormGRUCell, LayerNormLSTMCell
from weft.normalize.p_mod import MixtureOfDepths, progressive_ratios, select_tokens, tanh_norm
from weft.normalize.power_norm import PowerNorm
from weft.normalize.rms_norm import RMSNorm, center_output, rms_norm
from weft.normalize.scaled_weight_standardization import ScaledWeightStandardization, scaled_standardize
from weft.normalize.sigma_reparam import SigmaReparam
from weft.normalize.unified_norm import UnifiedNorm
from weft.normalize.weight_compander import WeightCompander, compand, expand
from weft.normalize.weight_distance import DistanceFit, WeightDistance, fit_distance
from weft.normalize.weight_standardization import WeightStandardization, standardize

__all__ = [
    "BatchChannelNorm2d",
    "CRMSNorm",
    "CenteredEmbedding",
    "CenteredLayerNorm",
    "ConvertedNorms",
    "DistanceFit",
    "EntropyMonitor",
    "EstimatedBatchNorm2d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "LayerNormGRUCell",
    "LayerNormLSTMCell",
    "MixtureOfDepths",
    "PowerNorm",
    "RMSNorm",
    "RestoringCRMSNorm",
    "ScaledWeightStandardization",
    "SigmaReparam",
    "UnifiedNorm",
    "WeightCompander",
    "WeightDistance",
    "WeightStandardization",
    "adapt_regime",
    "attention_entropy",
    "attention_entropy_bound",
    "center_output",
    "clip_grad_adaptive_",
    "compand",
    "convert_ghost_batch_norm_",
    "convert_layer_norm_cells_",
    "convert_to_crms_",
    "convert_to_rms_",
    "crms_norm",
    "drop_input",
    "expand",
    "fit_distance",
    "fold_affine",
    "fold_into_",
    "layer_norm_gru_cell",
    "layer_norm_lstm_cell",
    "logit_deviation",
    "progressive_ratios",
    "restore_feature",
    "rms_norm",
    "scale_learning_rate",
    "scaled_standardize",
    "select_tokens",
    "standardize",
    "tanh_norm",
]
