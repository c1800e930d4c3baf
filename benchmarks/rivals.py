"""Other solvers on the same instances: scipy's L-BFGS, HiGHS on the essay's linear program, CVXPY with Clarabel."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from problems import Rows
from report import now
from softmeet.heads import SoftmaxHead


@dataclass(frozen=True)
class Run:
    """Seconds, or None past the limit; reads of the heads, where that means something; what came out."""

    seconds: float | None
    passes: float | None
    note: str


class _Reached(Exception):  # noqa: N818 - not an error
    pass


def lbfgs(rows: Rows, row: int, trust: float, goal: float) -> Run:
    """Scipy's L-BFGS-B on the same whitened dual, fp32 products, until the dual value is at most ``goal``."""
    from scipy.optimize import minimize

    heads = rows.heads
    factors = [(h.whitening().center.float(), h.whitening().factor.float()) for h in heads]
    log_p = rows.log_probs[:, row].double()
    log_q = log_p.mean(0).log_softmax(-1)
    widths = [R.shape[1] for _, R in factors]
    reads = 0

    def scores(nu: Tensor) -> list[Tensor]:
        parts = nu.float().split(widths)
        return [
            (h.weight.detach() @ (R @ x)).double() - float(c @ (R @ x))
            for h, (c, R), x in zip(heads, factors, parts, strict=True)
        ]

    def dual(at: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        nonlocal reads
        reads += 2
        z = scores(torch.from_numpy(at))
        p_logs = log_q + sum(z)
        value, p, gradient = p_logs.logsumexp(-1), p_logs.softmax(-1), []
        for own, x, h, (c, R) in zip(log_p, z, heads, factors, strict=True):
            logs = own - x / trust
            value = value + trust * logs.logsumexp(-1)
            difference = (p - logs.softmax(-1)).float()
            gradient.append(R.T @ (difference @ h.weight.detach() - difference.sum() * c))
        if value.item() <= goal:
            raise _Reached
        return value.item(), torch.cat(gradient).double().numpy()

    start = now()
    try:
        found = minimize(dual, np.zeros(sum(widths)), jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 0})
    except _Reached:
        return Run(now() - start, reads, "same gap")
    short = float(found.fun - goal)
    return Run(now() - start, reads, f"stopped {short:.1e} nats above")


def highs(rows: Rows, truth: Tensor, row: int, limit: float) -> Run:
    """The essay's LP: minimise -Σ pᵀ log p̂_i with every member's moments, by HiGHS; feasible, as the premise holds."""
    from scipy.optimize import linprog

    A = torch.cat([h.weight.double() - h.weight.double().mean(0) for h in rows.heads], dim=1)
    A = A / A.norm(dim=0)
    equal = torch.cat([A.T, torch.ones(1, len(A), dtype=A.dtype)]).numpy()
    cost = -rows.log_probs[:, row].double().sum(0).numpy()
    right = np.append((truth[row].exp() @ A).numpy(), 1.0)
    start = time.perf_counter()
    found = linprog(cost, A_eq=equal, b_eq=right, bounds=(0, None), method="highs", options={"time_limit": limit})
    taken = time.perf_counter() - start
    done = found.status == 0
    return Run(taken if done else None, None, f"{int((found.x > 0).sum())} tokens" if done else f"over {limit:g} s")


def clarabel(rows: Rows, row: int, trust: float, limit: float) -> Run:
    """The same relaxation on the exponential cone."""
    import cvxpy as cp

    log_p = rows.log_probs[:, row].double()
    q = log_p.mean(0).softmax(-1).numpy()
    p = cp.Variable(len(q), nonneg=True)
    objective, constraints = cp.sum(cp.kl_div(p, q)), [cp.sum(p) == 1]
    for own, head in zip(log_p, rows.heads, strict=True):
        W = _unit(head)
        r = cp.Variable(len(q), nonneg=True)
        objective += trust * cp.sum(cp.kl_div(r, own.exp().numpy()))
        constraints += [cp.sum(r) == 1, W.T @ p == W.T @ r]
    problem = cp.Problem(cp.Minimize(objective), constraints)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            problem.solve(solver=cp.CLARABEL, time_limit=limit)
        except cp.SolverError:
            return Run(None, None, f"over {limit:g} s or failed")
    taken = time.perf_counter() - start
    solved = problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE)
    return Run(taken if solved else None, None, f"objective {problem.value:.6f}" if solved else problem.status)


def _unit(head: SoftmaxHead) -> NDArray[np.float64]:
    W = head.weight.double() - head.weight.double().mean(0)
    out: NDArray[np.float64] = (W / torch.linalg.matrix_norm(W, 2)).numpy()
    return out
