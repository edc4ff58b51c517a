"""Compress trained PyTorch networks: layers, capture, compression, fine-tuning, pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "BlockLowRankLinear",
    "Budget",
    "ButterflyLinear",
    "Compressed",
    "CompressionReport",
    "CompressionWarning",
    "FactorizedConv",
    "FactorizedLinear",
    "FineTuning",
    "FlopCount",
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
    "TensorTrain",
    "add_adapters",
    "balance_factors",
    "compress",
    "compress_gradually",
    "count_flops",
    "cubic_densities",
    "exact_triple_scores",
    "find_blocks",
    "fine_tune",
    "input_statistics",
    "keep_unchecked",
    "layer_options",
    "load_network",
    "make_permanent",
    "merge_adapters",
    "merge_update",
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

if TYPE_CHECKING:
    from matfact.torch._cache import keep_unchecked
    from matfact.torch._compress import Compressed, compress
    from matfact.torch.adapters import add_adapters, merge_adapters
    from matfact.torch.batchnorm import reestimate_batch_norm
    from matfact.torch.budget import Budget, layer_options, output_sensitivity
    from matfact.torch.capture import input_statistics
    from matfact.torch.checkpoint import load_network, save_network
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
    from matfact.torch.neurons import (
        NeuronBlock,
        NeuronPruning,
        PrunedBlock,
        find_blocks,
        prune_neurons,
    )
    from matfact.torch.perturbation import exact_triple_scores, triple_scores
    from matfact.torch.pruning import (
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
    from matfact.torch.report import CompressionReport, CompressionWarning, LayerReport
    from matfact.torch.structured import (
        BlockLowRankLinear,
        ButterflyLinear,
        KaleidoscopeLinear,
        LowRankLinear,
        MonarchLinear,
        SparseProductLinear,
    )
    from matfact.torch.tensor import (
        TensorTrain,
        tensor_train,
        tucker_svd,
    )
else:
    from matfact._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "_cache": ("keep_unchecked",),
            "_compress": ("Compressed", "compress"),
            "adapters": ("add_adapters", "merge_adapters"),
            "batchnorm": ("reestimate_batch_norm",),
            "budget": ("Budget", "layer_options", "output_sensitivity"),
            "capture": ("input_statistics",),
            "checkpoint": ("load_network", "save_network"),
            "conv": ("FactorizedConv",),
            "finetune": (
                "FineTuning",
                "balance_factors",
                "fine_tune",
                "merge_update",
                "soft_cross_entropy",
            ),
            "gradual": ("compress_gradually", "cubic_densities"),
            "init": ("randomize_supports", "reset_parameters"),
            "layers": ("FactorizedLinear",),
            "neurons": (
                "NeuronBlock",
                "NeuronPruning",
                "PrunedBlock",
                "find_blocks",
                "prune_neurons",
            ),
            "perturbation": ("exact_triple_scores", "triple_scores"),
            "pruning": (
                "FlopCount",
                "GradualMagnitude",
                "LayerCollapseWarning",
                "Prunable",
                "PruningReport",
                "count_flops",
                "make_permanent",
                "prunable_parameters",
                "prune_network",
                "pruning_scores",
                "to_torch_prune",
            ),
            "report": ("CompressionReport", "CompressionWarning", "LayerReport"),
            "structured": (
                "BlockLowRankLinear",
                "ButterflyLinear",
                "KaleidoscopeLinear",
                "LowRankLinear",
                "MonarchLinear",
                "SparseProductLinear",
            ),
            "tensor": ("TensorTrain", "tensor_train", "tucker_svd"),
        },
    )
