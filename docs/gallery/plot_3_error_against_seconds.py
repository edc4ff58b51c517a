"""
Error against seconds
=====================

More sweeps of the double sparse factorization (`max_iter`) lower the error, with diminishing
returns. The schedule stretches over all sweeps, so a short fit is not the beginning of a long one.
"""

import time

from matplotlib import pyplot as plt

from matfact import DoubleSparseFactorizer, MagnitudePruner
from matfact.compare import cut_matrices, load_weights

(W,) = cut_matrices(load_weights(), sizes=[192], per_size=1).values()
DoubleSparseFactorizer(density=0.25, max_iter=2).fit(W)  # compiles the kernels

seconds, errors = [], []
for max_iter in (5, 10, 20, 50, 100, 200):
    start = time.perf_counter()
    fit = DoubleSparseFactorizer(density=0.25, max_iter=max_iter).fit(W)
    seconds.append(time.perf_counter() - start)
    errors.append(fit.reconstruction_err_)
    plt.annotate(f" {max_iter}", (seconds[-1], errors[-1]))

plt.plot(seconds, errors, "o-", label="Double sparse, by max_iter")
pruned = MagnitudePruner(density=0.25).fit(W).reconstruction_err_
plt.axhline(pruned, color="gray", linestyle="--", label="Magnitude pruning")
plt.xscale("log")
plt.xlabel("seconds on this machine")
plt.ylabel("relative error")
plt.legend()
plt.show()
