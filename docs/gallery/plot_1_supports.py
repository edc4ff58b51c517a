"""
Supports of the factors
=======================

Three ways to store a quarter of the values of a matrix: two sparse factors found by ADMM, two
block-diagonal factors with a permutation (Monarch), and the levels of a butterfly.
"""

from matplotlib import pyplot as plt

from matfact import ButterflyFit, DoubleSparseFactorizer, MonarchProjector
from matfact.compare import cut_matrices, load_weights

(W,) = cut_matrices(load_weights(), sizes=[64], per_size=1).values()
fits = [
    DoubleSparseFactorizer(density=0.25).fit(W),
    MonarchProjector(density=0.25, n_blocks=8).fit(W),
    ButterflyFit(chain="square_dyadic").fit(W),
]

figure = plt.figure(figsize=(8, 8), layout="constrained")
for part, fit in zip(figure.subfigures(len(fits), 1), fits, strict=True):
    fit.operator_.plot(part)
    part.suptitle(f"{type(fit).__name__}: {fit.nnz_} values, error {fit.normalized_err_:.2f}")
plt.show()
