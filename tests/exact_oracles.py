"""Outside opinions on the rules over the feasible set: HiGHS, Clarabel and non-negative least squares.

A solver that fails raises; only an optimum of a program that always has one is taken for infeasibility.
"""

from __future__ import annotations

import warnings
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize, nnls

from softmeet.heads import as_head

Array = NDArray[np.float64]


def constraints(log_p: torch.Tensor, heads: list[Any], options: dict[str, Any]) -> tuple[list[Array], list[Array]]:
    """Per member W_i as a row's constraints have it, (v, d_i), and W_iᵀ p̂_i; dense, by their definitions.

    ``log_p`` is (n, v).
    """
    matrices, targets = [], []
    for own, given in zip(log_p, heads, strict=True):
        head = as_head(given)
        W = head.weight.double().numpy()
        if head.soft_cap is not None:
            # The logits of the instance: log-probabilities fix them up to a constant, which the cap itself pins down.
            W = W * head.slope(options["logits"][len(matrices)]).numpy()[:, None]
        else:
            W = W - W.mean(0)
        p = own.exp().numpy()
        matrices.append(W)
        targets.append(p @ W)
    return matrices, targets


def stacked(matrices: list[Array], targets: list[Array]) -> tuple[Array, Array]:
    """One system of full row rank, or as it is where it has no solution at all: (G, g), with the sum last."""
    G = np.hstack([*matrices, np.ones((len(matrices[0]), 1))])
    g = np.concatenate([*targets, [1.0]])
    U, s, Vt = np.linalg.svd(G, full_matrices=False)
    keep = s > 1e-9 * s[0]
    lost = g - Vt[keep].T @ (Vt[keep] @ g)
    if np.linalg.norm(lost) > 1e-7 * np.linalg.norm(g):
        return G / np.abs(G).max(0).clip(1e-300), g / np.abs(G).max(0).clip(1e-300)
    return U[:, keep] * np.sqrt(len(G)), (Vt[keep] @ g) / s[keep] * np.sqrt(len(G))


def linear(cost: Array, G: Array, g: Array, upper: Array | None = None) -> float:
    """Minimise cost·x over Gᵀx = g, 0 ≤ x ≤ upper, by HiGHS."""
    bounds = (0, None) if upper is None else np.stack([np.zeros_like(upper), upper], axis=1)
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(cost, A_eq=G.T, b_eq=g, bounds=bounds, method="highs", options=options)
    assert found.status == 0, found.message
    return float(found.fun)


def is_feasible(G: Array, g: Array) -> bool:
    """Whether the least Σ |Gᵀp - g| over p ≥ 0 is 0; that program always has an optimum."""
    m = G.shape[1]
    wide = np.vstack([G, np.eye(m), -np.eye(m)])
    cost = np.concatenate([np.zeros(len(G)), np.ones(2 * m)])
    return linear(cost, wide, g) < 1e-7


def squared_distance(matrices: list[Array], targets: list[Array]) -> float:
    """Minimise ‖Gᵀp - g‖² over the simplex, by non-negative least squares (design of Lawson and Hanson)."""
    A, b = np.hstack(matrices), np.concatenate(targets)
    scale = max(np.linalg.norm(A - b, axis=1).mean(), 1e-12)
    M = np.vstack([(A - b).T / scale, np.ones((1, len(A)))])
    u, _ = nnls(M, np.concatenate([np.zeros(len(b)), [1.0]]), maxiter=100 * len(A))
    p = u / u.sum()
    return float(np.square(A.T @ p - b).sum())


def underestimation(log_p: Array, G: Array, g: Array) -> float:
    """The least log t with p ≤ t min_i p̂_i, by HiGHS; x = p/t in units of Σ min_i p̂_i."""
    m = np.exp(log_p.min(0))
    upper = np.append(m / m.sum(), 2.0)
    cost = np.append(np.zeros(len(m)), -1.0)
    return -float(np.log(-linear(cost, np.vstack([G, -g]), np.zeros_like(g), upper) * m.sum()))


def _solved(problem: cp.Problem) -> float:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")  # judged by the tests' own tolerances
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10, max_iter=400)
    assert problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE), problem.status
    return float(problem.value)


def reverse_cross_entropy(mean: Array, G: Array, g: Array) -> float:
    """Minimise -Σ mean log p, by scipy on the dual: maximise Σ mean log z over z = 1 + (G - g)λ > 0.

    No p_j exceeds 1, so z_j ≥ mean_j at the optimum; below, the logarithm goes on as a parabola (Owen 2001, §3.14), and
    nothing constrains λ.
    """
    A = G - g

    def parts(lam: Array) -> tuple[Array, Array, Array]:
        x = (1 + A @ lam) / mean
        low, above = x < 1, np.maximum(x, 1)
        return (
            np.where(low, -1.5 + 2 * x - x**2 / 2, np.log(above)),
            np.where(low, 2 - x, 1 / above),
            np.where(low, 1, above**-2),
        )

    found = minimize(
        lambda lam: -(mean @ parts(lam)[0]),
        np.zeros(A.shape[1]),
        jac=lambda lam: -(A.T @ parts(lam)[1]),
        hess=lambda lam: (A * (parts(lam)[2] / mean)[:, None]).T @ A,
        method="trust-exact",
        options={"gtol": 1e-9, "maxiter": 5000},
    )
    return -float(found.fun)


def squared_cross_entropies(log_p: Array, weights: Array, G: Array, g: Array) -> float:
    """Minimise Σ w_i (pᵀ log p̂_i)², by Clarabel."""
    p = cp.Variable(log_p.shape[1], nonneg=True)
    return _solved(cp.Problem(cp.Minimize(cp.sum(cp.multiply(weights, cp.square(log_p @ p)))), [G.T @ p == g]))


def with_slack(cost: Array, matrices: list[Array], targets: list[Array], tau: float) -> float:
    """Minimise cost·p + ‖Gᵀp - g‖² / 2τ over the simplex, by Clarabel."""
    p = cp.Variable(len(cost), nonneg=True)
    off = np.hstack(matrices).T @ p - np.concatenate(targets)
    return _solved(cp.Problem(cp.Minimize(cost @ p + cp.sum_squares(off) / (2 * tau)), [cp.sum(p) == 1]))


def max_entropy(log_q: Array, G: Array, g: Array) -> float:
    """Minimise KL(p‖q), on the exponential cone."""
    p = cp.Variable(len(log_q), nonneg=True)
    return _solved(cp.Problem(cp.Minimize(cp.sum(cp.kl_div(p, np.exp(log_q)))), [G.T @ p == g]))


def whitened(matrices: list[Array], targets: list[Array], centred: bool = True) -> tuple[list[Array], list[Array]]:
    """Orthonormal columns per member, from a singular value decomposition, and their moments."""
    found = []
    for W, t in zip(matrices, targets, strict=True):
        U, s, Vt = np.linalg.svd(W, full_matrices=False)
        keep = s > 1e-6 * max(s[0], 1e-300) if len(s) else s > 0
        found.append((U[:, keep], (Vt[keep] @ t) / s[keep]))
    return [U for U, _ in found], [t for _, t in found]
