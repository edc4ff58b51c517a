"""
Error against density
=====================

Error of each method on an attention matrix of a trained sentence transformer, by density. Values
below 1 are better than magnitude pruning.
"""

from matplotlib import pyplot as plt

from matfact.compare import METHODS, compare_projections, cut_matrices, load_weights

matrices = cut_matrices(load_weights(), sizes=[128], per_size=1)
methods = ["dsf", "palm4msa", "lowrank"]
densities = [0.1, 0.15, 0.25, 0.4, 0.6]
table = compare_projections(matrices, methods, densities=densities)

figure, axes = plt.subplots(layout="constrained")
for method in methods:
    errors = [row.normalized_error for row in table if row.method == method]
    axes.plot(densities, errors)
    axes.annotate(f"  {METHODS[method].label}", (densities[-1], errors[-1]), va="center")
axes.axhline(1, color="gray", linestyle="--")
axes.annotate("magnitude pruning", (0.45, 1), (0, 4), textcoords="offset points")
axes.set(xlabel="density", ylabel="error ÷ error of magnitude pruning", ylim=(0, None))
plt.show()
