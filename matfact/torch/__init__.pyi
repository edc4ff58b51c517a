__all__ = [
    "BlockLowRankLinear",
    "Budget",
    "ButterflyLinear",
    "Calibration",
    "Compressed",
    "CompressionReport",
    "CompressionWarning",
    "FactorizedConv",
    "FactorizedLinear",
    "FineTuning",
    "FlopCount",
    "GpuRoads",
    "GradualMagnitude",
    "KaleidoscopeLinear",
    "LayerCollapseWarning",
    "LayerReport",
    "LowRankLinear",
    "MonarchLinear",
    "NeuronBlock",
    "NeuronPruning",
    "Prunable",
    "PrunedBlock",
    "PruningReport",
    "SparseProductLinear",
    "Speed",
    "TensorTrain",
    "add_adapters",
    "balance_factors",
    "compress",
    "compress_gradually",
    "count_flops",
    "cubic_densities",
    "distill",
    "exact_triple_scores",
    "find_blocks",
    "fine_tune",
    "input_statistics",
    "keep_unchecked",
    "layer_options",
    "load_network",
    "make_permanent",
    "measure_speed",
    "merge_adapters",
    "merge_update",
    "output_harm",
    "output_sensitivity",
    "prunable_parameters",
    "prune_network",
    "prune_neurons",
    "pruning_scores",
    "randomize_supports",
    "reestimate_batch_norm",
    "reset_parameters",
    "save_network",
    "soft_cross_entropy",
    "tensor_train",
    "to_torch_prune",
    "triple_scores",
    "tucker_svd",
]

from ._warnings import CompressionWarning
from .calibration.batchnorm import reestimate_batch_norm
from .calibration.options import Calibration
from .calibration.statistics import input_statistics
from .checkpoint.network import load_network, save_network
from .compression._compress import Compressed, CompressionReport, LayerReport, compress
from .compression.budget import Budget, layer_options
from .compression.gradual import compress_gradually, cubic_densities
from .layers._derived import keep_unchecked
from .layers._gpu import GpuRoads
from .layers.conv import FactorizedConv
from .layers.init import randomize_supports, reset_parameters
from .layers.linear import FactorizedLinear
from .layers.structured import (
    BlockLowRankLinear,
    ButterflyLinear,
    KaleidoscopeLinear,
    LowRankLinear,
    MonarchLinear,
    SparseProductLinear,
)
from .neurons import NeuronBlock, NeuronPruning, PrunedBlock, find_blocks, prune_neurons
from .pruning import (
    FlopCount,
    GradualMagnitude,
    LayerCollapseWarning,
    Prunable,
    PruningReport,
    count_flops,
    make_permanent,
    prunable_parameters,
    prune_network,
    pruning_scores,
    to_torch_prune,
)
from .sensitivity.harm import output_harm
from .sensitivity.outputs import output_sensitivity
from .sensitivity.triples import exact_triple_scores, triple_scores
from .speed import Speed, measure_speed
from .tensor_decomposition import TensorTrain, tensor_train, tucker_svd
from .training.adapters import add_adapters, merge_adapters
from .training.distillation import distill
from .training.finetune import (
    FineTuning,
    balance_factors,
    fine_tune,
    merge_update,
    soft_cross_entropy,
)
