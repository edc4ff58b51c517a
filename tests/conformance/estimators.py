"""The estimators every conformance test runs over."""

from matfact import (
    GPTQ,
    ADMMPruner,
    BlockSVD,
    ButterflyFit,
    CoSaMPNeuronSelector,
    DoubleBinaryFactorizer,
    DoubleSparseFactorizer,
    KaleidoscopeFit,
    LowRank,
    MagnitudePruner,
    MonarchProjector,
    OBSPruner,
    Palm4MSA,
    Quantized,
    RoundToNearest,
    SparseGPT,
    WandaPruner,
)

FACTORIZERS = {
    "dsf": DoubleSparseFactorizer(max_iter=30),
    "dsf-three-factors": DoubleSparseFactorizer(n_factors=3, max_iter=10),
    "palm4msa": Palm4MSA(max_iter=30),
    "palm4msa-hierarchical": Palm4MSA(n_factors=3, hierarchical="left", max_iter=10),
    "butterfly": ButterflyFit(),
    "blocksvd": BlockSVD(),
    "monarch": MonarchProjector(),
    "lowrank": LowRank(),
    "magnitude": MagnitudePruner(),
    "wanda": WandaPruner(),
    "admm": ADMMPruner(),
    "sparsegpt": SparseGPT(),
    "obs": OBSPruner(),
}

#: Those whose values take few bits, which are not exact however many are stored.
QUANTIZED = {
    "double-binary": DoubleBinaryFactorizer(bits=8.0, max_iter=30),
    "quantized": Quantized(bits=8),
    "rtn": RoundToNearest(bits=8),
    "gptq": GPTQ(bits=8),
    "quantized-admm": Quantized(ADMMPruner(), bits=6, group_size=None),
}

ESTIMATORS = [
    DoubleBinaryFactorizer(max_iter=20),
    DoubleSparseFactorizer(),
    Quantized(bits=8),
    Palm4MSA(),
    ButterflyFit(),
    KaleidoscopeFit(),
    BlockSVD(),
    MonarchProjector(),
    LowRank(),
    MagnitudePruner(),
    WandaPruner(),
    ADMMPruner(),
    SparseGPT(),
    OBSPruner(),
    RoundToNearest(),
    GPTQ(),
    CoSaMPNeuronSelector(),
]
