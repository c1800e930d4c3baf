"""Outside opinions: a plain Newton method that shares no code with the package, and CVXPY with Clarabel."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import cvxpy as cp
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def logsumexp(x: Array) -> float:
    """Return log Σ exp x, as scipy has it, whose own takes ten times as long for a few numbers."""
    most = x.max()
    return float(most + np.log(np.exp(x - most).sum()))


def softmax(x: Array) -> Array:
    """Return exp x / Σ exp x."""
    return np.exp(x - logsumexp(x))


def plain_newton(log_q: Array, log_p: Array, heads: Sequence[Array], trust: Sequence[float]) -> tuple[Array, float]:
    """(p, f*) of one row, by Newton's method on the dual in the heads' own coordinates; infinite trust allowed."""
    p, least, _ = damped_newton(log_q, log_p, heads, trust)
    return p, least


def damped_newton(
    log_q: Array, log_p: Array, heads: Sequence[Array], trust: Sequence[float], tol: float = 0.0
) -> tuple[Array, float, int]:
    """The same with the steps it took, until its own estimate of the gap, half of the decrement, is ``tol``."""
    heads = [W - W.mean(0) for W in heads]
    sizes = [W.shape[1] for W in heads]
    places = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    A = np.concatenate(heads, axis=1)
    lam = np.zeros(A.shape[1])

    def value(at: Array) -> float:
        total = logsumexp(log_q + A @ at)
        for W, place, lp, rho in zip(heads, places, log_p, trust, strict=True):
            u = W @ at[place]
            total += -np.exp(lp) @ u if math.isinf(rho) else rho * logsumexp(lp - u / rho)
        return float(total)

    before = math.inf
    steps = 0
    while steps < 400:
        p = softmax(log_q + A @ lam)
        H = (A * p[:, None]).T @ A - np.outer(A.T @ p, A.T @ p)
        g = A.T @ p
        for W, place, lp, rho in zip(heads, places, log_p, trust, strict=True):
            r = softmax(lp - W @ lam[place] / rho)
            g[place] -= W.T @ r
            if not math.isinf(rho):
                H[place, place] += ((W * r[:, None]).T @ W - np.outer(W.T @ r, W.T @ r)) / rho
        step = np.linalg.lstsq(H, g, rcond=1e-13)[0]
        t, now, fall = 1.0, value(lam), g @ step
        if fall <= 2 * tol:
            break
        if fall < 1e-16 or before / 2 < fall < 1e-10:
            # The last step doubles the digits; what is left of the slope then is rounding, which never falls.
            lam = lam - step
            break
        before = fall
        while value(lam - t * step) > now - 1e-4 * t * fall and t > 1e-12:
            t /= 2
        if t <= 1e-12:
            break
        lam, steps = lam - t * step, steps + 1
    return softmax(log_q + A @ lam), value(lam), steps


def fall(log_q: Array, log_p: Array, heads: Sequence[Array], trust: Sequence[float], dual: Sequence[Array]) -> float:
    """f(λ) - f(0) of one row, by the definition."""
    found = logsumexp(log_q + sum(W @ lam for W, lam in zip(heads, dual, strict=True)))
    for W, lam, own, rho in zip(heads, dual, log_p, trust, strict=True):
        found += rho * logsumexp(own - W @ lam / rho)
    return found


def by_cvxpy(log_q: Array, log_p: Array, heads: Sequence[Array], trust: Sequence[float]) -> tuple[Array, float]:
    """(p, primal optimum) of one row, on the exponential cone."""
    v = len(log_q)
    p = cp.Variable(v, nonneg=True)
    objective, constraints = cp.sum(cp.kl_div(p, np.exp(log_q))), [cp.sum(p) == 1]
    for W, lp, rho in zip(heads, log_p, trust, strict=True):
        if rho == 0:
            continue
        W = (W - W.mean(0)) / np.linalg.norm(W - W.mean(0), ord=2)
        if math.isinf(rho):
            constraints.append(W.T @ p == W.T @ np.exp(lp))
            continue
        r = cp.Variable(v, nonneg=True)
        objective += rho * cp.sum(cp.kl_div(r, np.exp(lp)))
        constraints += [cp.sum(r) == 1, W.T @ p == W.T @ r]
    problem = cp.Problem(cp.Minimize(objective), constraints)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")  # judged by the tests' own tolerances
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11, max_iter=400)
    assert problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE), problem.status
    return np.asarray(p.value), float(problem.value)
