"""Conjugate gradients of one row as a compiled loop: the interpreter takes no part, and other threads can go on.

A step reads the gathered rows once, the heaviest tokens' twice, and one d × d matrix per member. Without numba, or
where :func:`softmeet.kernels.fits` says no, callers use :mod:`softmeet.solvers.conjugate`, with the same results to
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmeet import kernels
from softmeet.kernels import arrays, ends_of

if kernels.ENABLED:
    from softmeet.kernels import _add, _curve, _dots, _plain, _sums

    @_sums
    def _dot(x, y):  # type: ignore[no-untyped-def]
        total = 0.0
        for k in range(len(x)):
            total += x[k] * y[k]
        return total

    @_plain
    def _along(x, t, d, out):  # type: ignore[no-untyped-def]
        """Out = x + t d."""
        for k in range(len(x)):
            out[k] = x[k] + t * d[k]

    @_plain
    def _inverted(rows, scaled, precisions, core, ends, ridge, g, y, stretched):  # type: ignore[no-untyped-def]
        """Y = M⁻¹ g, and C_i y_i without reading C_i."""
        n, k, D = len(rows), rows[0].shape[0], len(g)
        low, out = np.empty(D, np.float32), np.empty(D, np.float32)
        up, down = np.empty(n * k, np.float32), np.empty(n * k, np.float32)
        for j in range(D):
            low[j] = g[j]
        for i in range(n):
            _dots(scaled[i], low[ends[i] : ends[i + 1]], up[i * k : (i + 1) * k])
        for j in range(n * k):
            down[j] = -_dot(core[j], up)
        for i in range(n):
            place, mine = slice(ends[i], ends[i + 1]), slice(i * k, (i + 1) * k)
            _dots(precisions[i], low[place], out[place])
            for j in range(ends[i], ends[i + 1]):
                out[j] /= ridge[i]
            _add(scaled[i], down[mine], out[place])
            _add(rows[i], down[mine], low[place])
            for j in range(ends[i], ends[i + 1]):
                y[j], stretched[j] = out[j], low[j] / ridge[i]

    @_sums
    def _growth(m, x):  # type: ignore[no-untyped-def]
        """Σ m · log E e^{x - E x} under the masses m."""
        total, mean, most = 0.0, 0.0, 0.0
        for j in range(len(m)):
            total += m[j]
            mean += m[j] * x[j]
        if not total > 0:
            return 0.0
        mean /= total
        for j in range(len(m)):
            most = max(most, x[j] - mean)
        grown = 0.0
        for j in range(len(m)):
            grown += m[j] * np.exp(x[j] - mean - most)
        return total * (most + np.log(grown / total))

    @_plain
    def _product(  # type: ignore[no-untyped-def]
        gathered, ends, u, w, alpha, gamma, mean, means, ridge, d, Cd, scores, Hd
    ):
        """H d, with the scores of d, given C d."""
        sums, low, out = np.zeros(1 + len(w)), np.empty(len(d), np.float32), np.zeros(len(d), np.float32)
        for k in range(len(d)):
            low[k] = d[k]
        _curve(gathered, ends, low, u, w, alpha, gamma, scores, sums, out)
        for i in range(len(w)):
            for k in range(ends[i], ends[i + 1]):
                centred = alpha[i] * (sums[0] * mean[k] + gamma[i] * sums[1 + i] * means[k])
                Hd[k] = out[k] - centred + ridge[i] * Cd[k]

    @_plain
    def _fallen(ends, u, w, alpha, gamma, trust, ridge, g, s, Cs, y):  # type: ignore[no-untyped-def]
        """How much F falls from 0 to -s, with gradient g at 0, C s and the scores y of s."""
        fallen, x, tilt = _dot(g, s), np.empty(len(u), np.float32), np.zeros(len(u), np.float32)
        for i in range(len(w)):
            place = slice(ends[i], ends[i + 1])
            fallen -= 0.5 * ridge[i] * _dot(s[place], Cs[place])
            for j in range(len(u)):
                x[j] = gamma[i] * y[i, j]
                tilt[j] -= alpha[i] * y[i, j]
            if trust[i] < np.inf:
                fallen -= trust[i] * _growth(w[i], x)
        return fallen - _growth(u, tilt)

    @_plain
    def _conjugate(  # type: ignore[no-untyped-def]
        gathered, u, w, alpha, gamma, trust, mean, means, ridge,
        rows, scaled, precisions, core, own_ridge, ends, g, reduction, limit, fall, s,
    ):  # fmt: skip
        n, D = len(w), len(g)
        residual, z, d, Hd, Cz, Cd = np.empty(D), np.zeros(D), np.zeros(D), np.zeros(D), np.zeros(D), np.zeros(D)
        Cs, s_next, Cs_next = np.zeros(D), np.zeros(D), np.zeros(D)
        scores, y, y_next = np.zeros(w.shape, np.float32), np.zeros(w.shape, np.float32), np.zeros(w.shape, np.float32)
        _along(g, 0.0, g, residual)
        _inverted(rows, scaled, precisions, core, ends, own_ridge, residual, z, Cz)
        size, beta, fallen = _dot(residual, z), 0.0, 0.0
        goal = reduction**2 * size
        for k in range(limit):
            if not size > goal:
                break
            _along(z, beta, d, d)
            _along(Cz, beta, Cd, Cd)
            _product(gathered, ends, u, w, alpha, gamma, mean, means, ridge, d, Cd, scores, Hd)
            curvature = _dot(d, Hd)
            if not curvature > 0:
                break
            step = size / curvature
            _along(s, step, d, s_next)
            _along(Cs, step, Cd, Cs_next)
            for i in range(n):
                _along(y[i], step, scores[i], y_next[i])
            further = _fallen(ends, u, w, alpha, gamma, trust, ridge, g, s_next, Cs_next, y_next)
            if k > 0 and not further - fallen >= fall * 0.5 * step * size:
                break
            s[:] = s_next
            y, y_next, Cs, Cs_next, fallen = y_next, y, Cs_next, Cs, further
            _along(residual, -step, Hd, residual)
            _inverted(rows, scaled, precisions, core, ends, own_ridge, residual, z, Cz)
            last, size = size, _dot(residual, z)
            beta = size / last


@dataclass(frozen=True, eq=False)
class Curved:
    """The Hessian of one row's surrogate: what :func:`softmeet.kernels.curve` needs, and

    Args:
        trust: ρ_i, (n,), fp64.
        mean, means: the tokens' means under u and under w_i, all members side by side, fp64.
        ridge: of the surrogate, (n,), fp64.
    """

    rows: list[Tensor]
    u: Float[Tensor, " M"]
    w: Float[Tensor, "n M"]
    alpha: Float[Tensor, " n"]
    gamma: Float[Tensor, " n"]
    trust: Float[Tensor, " n"]
    mean: Float[Tensor, " D"]
    means: Float[Tensor, " D"]
    ridge: Float[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Inverse:
    """M⁻¹ = Λ⁻¹ - BᵀKB of one row, Λ_i = λ_i C_i.

    Args:
        rows: R_i, (k, d_i), fp32; scaled: B_i = R_i Λ_i⁻¹; precisions: C_i⁻¹, (d_i, d_i), fp32.
        core: K, (n k, n k), fp64.
        ridge: λ_i, (n,), fp64.
    """

    rows: list[Tensor]
    scaled: list[Tensor]
    precisions: list[Tensor]
    core: Float[Tensor, "m m"]
    ridge: Float[Tensor, " n"]


def conjugate_gradients(
    H: Curved, M: Inverse, g: Float[Tensor, " D"], reduction: float, limit: int, fall: float
) -> Float[Tensor, " D"]:
    """H⁻¹ g of one row, as :func:`softmeet.solvers.conjugate.conjugate_gradients` has it; g in fp64.

    From the second step on, F, which H and g are of, has to fall by the part ``fall`` of what ½ sᵀHs - gᵀs does. The
    products C_i d that the ridge needs follow from M⁻¹ r, so that of all d × d matrices only C_i⁻¹ is read.
    """
    s = np.zeros(len(g))
    _conjugate(
        arrays(H.rows), *(a.numpy() for a in (H.u, H.w, H.alpha, H.gamma, H.trust, H.mean, H.means, H.ridge)),
        arrays(M.rows), arrays(M.scaled), arrays(M.precisions), M.core.numpy(), M.ridge.numpy(),
        ends_of(H.rows), g.numpy(), reduction, limit, fall, s,
    )  # fmt: skip
    return torch.from_numpy(s)
