"""The estimators every conformance test runs over."""

from matfact import (
    GPTQ,
    ADMMPruner,
    BlockSVD,
    ButterflyFit,
    CoSaMPNeuronSelector,
    DoubleSparseFactorizer,
    KaleidoscopeFit,
    LowRank,
    MagnitudePruner,
    MonarchProjector,
    OBSPruner,
    Palm4MSA,
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
    "rtn": RoundToNearest(),
    "gptq": GPTQ(),
}
#: Those that can be asked for a number of stored values.
WITH_DENSITY = {n: f for n, f in FACTORIZERS.items() if "density" in f.get_params(deep=False)}

ESTIMATORS = [
    DoubleSparseFactorizer(),
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
