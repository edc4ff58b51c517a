"""
Error against sweeps
====================

More sweeps of the double sparse factorization (`max_iter`) lower the error, with diminishing
returns; the time grows in proportion to them. The schedule stretches over all sweeps, so a short
fit is not the beginning of a long one.
"""

from matplotlib import pyplot as plt

from matfact import DoubleSparseFactorizer, MagnitudePruner
from matfact.compare import cut_matrices, load_weights

(W,) = cut_matrices(load_weights(), sizes=[192], per_size=1).values()
sweeps = [5, 10, 20, 50, 100, 200, 400]
fits = [DoubleSparseFactorizer(density=0.25, max_iter=max_iter).fit(W) for max_iter in sweeps]
pruned = MagnitudePruner(density=0.25).fit(W)

figure, axes = plt.subplots(layout="constrained")
axes.plot(sweeps, [fit.reconstruction_err_ for fit in fits])
axes.annotate(
    "double sparse", (sweeps[2], fits[2].reconstruction_err_), (5, 8), textcoords="offset points"
)
axes.axhline(pruned.reconstruction_err_, color="gray", linestyle="--")
axes.annotate(
    "magnitude pruning",
    (sweeps[0], pruned.reconstruction_err_),
    (0, -14),
    textcoords="offset points",
)
axes.set(xscale="log", xlabel="sweeps", ylabel="relative error", ylim=(0, None))
axes.set_xticks(sweeps, sweeps, minor=False)
axes.minorticks_off()
plt.show()
