"""Double sparse factorization as published: the baseline of the benchmarks.

A direct implementation of Boža & Macko 2025, Algorithm 1, written from the paper with the settings
of its authors. It is deliberately not optimized: thresholds come from full sorts, systems are
solved by LU inverses, the Gram matrix is computed before and after normalization, and each inner
solve ends with an unused update.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

DAMPING = 1e-2  #: of the unit diagonal of the Gram matrix
MASK_UPDATES = 2  #: inner iterations that choose the support


def published_dsf(
    W: torch.Tensor,
    density: float = 0.25,
    first_factor_density: float | None = None,
    outer: int = 40,
    inner: int = 5,
    anneal: bool = True,
    start: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the factors ``(L, R)``, ``W ≈ L R``, after each outer iteration.

    The small factor A is square on the shorter side of `W`. Its own density is, as in the paper,
    16 % for a square `W` and 25 % for a rectangular one. It is updated first.

    Parameters
    ----------
    W : torch.Tensor of shape (out_features, in_features)
        The matrix, in float32 or float64.
    density : float
        Stored values of both factors ÷ entries of `W`.
    first_factor_density : float, optional
        Nonzeros of A ÷ entries of A.
    outer, inner : int
        Iterations.
    anneal : bool
        Whether the first step of each solve has a penalty that grows from 0 to 1, and not 1.
    start : torch.Tensor, optional
        A to begin with: B is then solved for once before A is, instead of being pruned from `W`.
    """
    if W.shape[0] > W.shape[1]:
        start = None if start is None else start.T
        settings = (first_factor_density, outer, inner, anneal, start)
        for left, right in published_dsf(W.T, density, *settings):
            yield right.T, left.T
        return
    if first_factor_density is None:
        first_factor_density = 0.16 if W.shape[0] == W.shape[1] else 0.25
    n = W.shape[0]
    nnz_a = int(first_factor_density * n * n)
    nnz_b = int(density * W.numel()) - nnz_a
    if nnz_b < 1:
        raise ValueError(f"density={density} leaves nothing for the second factor.")

    A = torch.eye(n, dtype=W.dtype)
    B = W * largest(W, nnz_b // 2)
    dual_a, dual_b = torch.zeros_like(A), torch.zeros_like(B)
    if start is not None:
        A = start
        B, dual_b = solve(A, W, nnz_b, B, dual_b, 1.0, inner)
    for k in range(outer):
        rho = min(1.0, k / max(1, outer - 3)) ** 3 if anneal else 1.0
        A_t, dual_t = solve(B.T, W.T, nnz_a, A.T, dual_a.T, rho, inner)
        A, dual_a = A_t.T, dual_t.T
        B, dual_b = solve(A, W, nnz_b, B, dual_b, rho, inner)
        yield A, B


def solve(
    A: torch.Tensor,
    W: torch.Tensor,
    nnz: int,
    Z: torch.Tensor,
    U: torch.Tensor,
    first_rho: float,
    inner: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Z with `nnz` nonzeros such that ``A Z ≈ W``, and its dual, by warm-started ADMM."""
    norms = torch.diagonal(A.T @ A).sqrt() + 1e-8
    A = A / norms
    Z, U = Z * norms[:, None], U * norms[:, None]
    gram = A.T @ A
    identity = torch.eye(len(gram), dtype=gram.dtype)
    gram = gram + DAMPING * torch.diagonal(gram).mean() * identity
    target = A.T @ W
    inverse = torch.linalg.inv(gram + identity)
    B = torch.linalg.inv(gram + first_rho * identity) @ (target + first_rho * (Z - U))
    for i in range(inner):
        if i < MASK_UPDATES:
            mask = largest(B + U, nnz)
        Z = mask * (B + U)
        U = U + B - Z
        B = inverse @ (target + Z - U)
    return Z / norms[:, None], U / norms[:, None]


def largest(X: torch.Tensor, nnz: int) -> torch.Tensor:
    """Return the mask of the entries above the (`nnz` + 1)-th largest magnitude, from a sort."""
    magnitudes = X.abs()
    ordered = magnitudes.flatten().sort(descending=True).values
    return magnitudes > ordered[min(nnz, ordered.numel() - 1)]
