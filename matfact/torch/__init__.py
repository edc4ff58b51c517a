"""Compress trained PyTorch networks: layers, capture, compression, fine-tuning."""

from matfact.torch.batchnorm import reestimate_batch_norm
from matfact.torch.budget import layer_options, output_sensitivity
from matfact.torch.capture import input_statistics
from matfact.torch.checkpoint import load_network, save_network
from matfact.torch.compress import Compressed, compress
from matfact.torch.conv import FactorizedConv
from matfact.torch.finetune import (
    FineTuning,
    balance_factors,
    fine_tune,
    merge_update,
    soft_cross_entropy,
)
from matfact.torch.gradual import compress_gradually, cubic_densities
from matfact.torch.init import randomize_supports, reset_parameters
from matfact.torch.layers import FactorizedLinear
from matfact.torch.perturbation import exact_triple_scores, triple_scores
from matfact.torch.report import CompressionReport, LayerReport
from matfact.torch.structured import (
    BlockLowRankLinear,
    ButterflyLinear,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
)

__all__ = [
    "BlockLowRankLinear",
    "ButterflyLinear",
    "Compressed",
    "CompressionReport",
    "FactorizedConv",
    "FactorizedLinear",
    "FineTuning",
    "LayerReport",
    "LowRankLinear",
    "MonarchLinear",
    "SparseProductLinear",
    "balance_factors",
    "compress",
    "compress_gradually",
    "cubic_densities",
    "exact_triple_scores",
    "fine_tune",
    "input_statistics",
    "layer_options",
    "load_network",
    "merge_update",
    "output_sensitivity",
    "randomize_supports",
    "reestimate_batch_norm",
    "reset_parameters",
    "save_network",
    "soft_cross_entropy",
    "triple_scores",
]
