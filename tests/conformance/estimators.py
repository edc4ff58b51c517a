"""The estimators every conformance test runs over."""

from matfact import (
    ADMMPruner,
    BlockSVD,
    ButterflyFit,
    CoSaMPNeuronSelector,
    DoubleSparseFactorizer,
    KaleidoscopeFit,
    LowRank,
    MagnitudePruner,
    MonarchProjector,
    Palm4MSA,
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
}

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
    CoSaMPNeuronSelector(),
]
