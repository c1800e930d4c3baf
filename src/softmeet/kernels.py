"""Compiled loops for processors: a block of rows is read once, for a product with it and one with its transpose.

Two library calls would read the matrix twice, which is what a row alone spends its time on. numba is optional
(``pip install 'softmeet[fast]'``); without it, or where :func:`fits` says no, callers use torch, with the same results
to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

try:
    import numba
except ImportError:  # pragma: no cover - tested by switching ENABLED off
    numba = None

ENABLED = numba is not None
# Tokens whose rows stay in a core's cache between the two products.
_TOKENS = 64


def fits(*matrices: Tensor) -> bool:
    """Whether the compiled loops can read these: contiguous fp32 matrices in ordinary memory."""
    return ENABLED and all(m.device.type == "cpu" and m.dtype == torch.float32 and m.is_contiguous() for m in matrices)


if numba is not None:
    _sums = numba.njit(fastmath={"reassoc", "contract"}, nogil=True, cache=True)
    _plain = numba.njit(nogil=True, cache=True)

    @_sums
    def _dots(rows, x, out):  # type: ignore[no-untyped-def]
        """out_j = rows_j · x, four rows at a time."""
        M, d = rows.shape
        for j in range(0, M - M % 4, 4):
            a, b, c, e = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
            p, q, r, s = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for k in range(d):
                p += a[k] * x[k]
                q += b[k] * x[k]
                r += c[k] * x[k]
                s += e[k] * x[k]
            out[j], out[j + 1], out[j + 2], out[j + 3] = p, q, r, s
        for j in range(M - M % 4, M):
            p = np.float32(0)
            for k in range(d):
                p += rows[j, k] * x[k]
            out[j] = p

    @_sums
    def _add(rows, m, out):  # type: ignore[no-untyped-def]
        """Out += Σ_j m_j rows_j, four rows at a time."""
        M, d = rows.shape
        for j in range(0, M - M % 4, 4):
            a, b, c, e = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
            p, q, r, s = m[j], m[j + 1], m[j + 2], m[j + 3]
            for k in range(d):
                out[k] += p * a[k] + q * b[k] + r * c[k] + s * e[k]
        for j in range(M - M % 4, M):
            for k in range(d):
                out[k] += m[j] * rows[j, k]

    @_sums
    def _add_both(rows, m, n, out_m, out_n):  # type: ignore[no-untyped-def]
        """Out_m += Σ_j m_j rows_j and out_n += Σ_j n_j rows_j, four rows at a time."""
        M, d = rows.shape
        for j in range(0, M - M % 4, 4):
            a, b, c, e = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
            p, q, r, s = m[j], m[j + 1], m[j + 2], m[j + 3]
            t, u, v, w = n[j], n[j + 1], n[j + 2], n[j + 3]
            for k in range(d):
                out_m[k] += p * a[k] + q * b[k] + r * c[k] + s * e[k]
                out_n[k] += t * a[k] + u * b[k] + v * c[k] + w * e[k]
        for j in range(M - M % 4, M):
            for k in range(d):
                out_m[k] += m[j] * rows[j, k]
                out_n[k] += n[j] * rows[j, k]

    @_plain
    def _sweep(  # type: ignore[no-untyped-def]  # noqa: C901 - one loop nest, compiled
        weights, ends, x, offset, alpha, gamma, log_q, log_m, z, log_p, log_r, top, sums, first
    ):
        n, v = z.shape
        dots = np.zeros(_TOKENS, np.float32)
        masses = np.zeros((1 + n, _TOKENS), np.float32)
        block = np.zeros(first.shape, np.float32)
        for start in range(0, v, _TOKENS):
            size = min(_TOKENS, v - start)
            for i in range(n):
                rows = weights[i][start : start + size]
                _dots(rows, x[ends[i] : ends[i + 1]], dots)
                for k in range(len(rows)):
                    z[i, start + k] += dots[k] - offset[i]
            for k in range(size):
                j = start + k
                t = log_q[j]
                for i in range(n):
                    t += alpha[i] * z[i, j]
                    log_r[i, j] = log_m[i, j] - gamma[i] * z[i, j]
                log_p[j] = t
            for i in range(1 + n):
                logs = log_p[start : start + size] if i == 0 else log_r[i - 1, start : start + size]
                best = logs.max()
                if best > top[i]:
                    scale = np.exp(top[i] - best)
                    top[i] = best
                    sums[i] *= scale
                    if i == 0:
                        first[0] *= scale
                    else:
                        first[1, ends[i - 1] : ends[i]] *= scale
                total = 0.0
                for k in range(size):
                    m = np.exp(logs[k] - top[i]) if logs[k] > -np.inf else 0.0
                    total += m
                    masses[i, k] = m
                sums[i] += total
            block[:] = 0
            for i in range(n):
                rows, place = weights[i][start : start + size], slice(ends[i], ends[i + 1])
                _add_both(rows, masses[0], masses[1 + i], block[0, place], block[1, place])
            first += block

    @_plain
    def _moments(rows, u, w, out):  # type: ignore[no-untyped-def]
        for start in range(0, len(u), _TOKENS):
            tokens = slice(start, start + _TOKENS)
            _add_both(rows[tokens], u[tokens], w[tokens], out[0], out[1])

    @_plain
    def _curve(rows, ends, x, u, w, alpha, gamma, y, sums, out):  # type: ignore[no-untyped-def]
        n, M = w.shape
        c = np.zeros(_TOKENS, np.float32)
        joint = np.zeros(_TOKENS, np.float32)
        for start in range(0, M, _TOKENS):
            size = min(_TOKENS, M - start)
            joint[:] = 0
            for i in range(n):
                _dots(rows[i][start : start + size], x[ends[i] : ends[i + 1]], y[i, start : start + size])
                for k in range(size):
                    joint[k] += alpha[i] * y[i, start + k]
            for k in range(size):
                sums[0] += u[start + k] * joint[k]
            for i in range(n):
                for k in range(size):
                    j = start + k
                    sums[1 + i] += w[i, j] * y[i, j]
                    c[k] = alpha[i] * (u[j] * joint[k] + gamma[i] * w[i, j] * y[i, j])
                _add(rows[i][start : start + size], c, out[ends[i] : ends[i + 1]])

    @_sums
    def _dot(x, y):  # type: ignore[no-untyped-def]
        total = 0.0
        for k in range(len(x)):
            total += x[k] * y[k]
        return total

    @_plain
    def _inverted(rows, scaled, precisions, core, ends, ridge, g, y, stretched):  # type: ignore[no-untyped-def]
        """Y = M⁻¹ g, and C_i y_i without reading C_i."""
        n = len(rows)
        k = rows[0].shape[0]
        low = g.astype(np.float32)
        up = np.zeros(n * k, np.float32)
        for i in range(n):
            _dots(scaled[i], low[ends[i] : ends[i + 1]], up[i * k : (i + 1) * k])
        down = np.zeros(n * k, np.float32)
        for j in range(n * k):
            down[j] = -_dot(core[j], up)
        for i in range(n):
            place = slice(ends[i], ends[i + 1])
            x = low[place] / np.float32(ridge[i])
            out, left = np.zeros(len(x), np.float32), x.copy()
            _dots(precisions[i], x, out)
            _add(scaled[i], down[i * k : (i + 1) * k], out)
            _add(rows[i], down[i * k : (i + 1) * k] / np.float32(ridge[i]), left)
            y[place] = out
            stretched[place] = left

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
        sums, out = np.zeros(1 + len(w)), np.zeros(len(d), np.float32)
        _curve(gathered, ends, d.astype(np.float32), u, w, alpha, gamma, scores, sums, out)
        for i in range(len(w)):
            for k in range(ends[i], ends[i + 1]):
                centred = alpha[i] * (sums[0] * mean[k] + gamma[i] * sums[1 + i] * means[k])
                Hd[k] = out[k] - centred + ridge[i] * Cd[k]

    @_plain
    def _fallen(  # type: ignore[no-untyped-def]
        ends, u, w, alpha, gamma, trust, ridge, g, s, Cs, y
    ):
        """How much F falls from 0 to -s, with gradient g at 0, C s and the scores y of s."""
        fallen, tilt = _dot(g, s), np.zeros(len(u), np.float32)
        for i in range(len(w)):
            tilt -= alpha[i] * y[i]
            place = slice(ends[i], ends[i + 1])
            fallen -= 0.5 * ridge[i] * _dot(s[place], Cs[place])
            if trust[i] < np.inf:
                fallen -= trust[i] * _growth(w[i], gamma[i] * y[i])
        return fallen - _growth(u, tilt)

    @_plain
    def _conjugate(  # type: ignore[no-untyped-def]
        gathered, u, w, alpha, gamma, trust, mean, means, ridge,
        rows, scaled, precisions, core, own_ridge, ends, g, reduction, limit, fall, s,
    ):  # fmt: skip
        D = len(g)
        residual, scores, y = g.copy(), np.zeros(w.shape, np.float32), np.zeros(w.shape, np.float32)
        z, d, Hd, Cz, Cd, Cs = np.zeros(D), np.zeros(D), np.zeros(D), np.zeros(D), np.zeros(D), np.zeros(D)
        _inverted(rows, scaled, precisions, core, ends, own_ridge, residual, z, Cz)
        size, beta, fallen = _dot(residual, z), 0.0, 0.0
        goal = reduction**2 * size
        for k in range(limit):
            if not size > goal:
                break
            d, Cd = z + beta * d, Cz + beta * Cd
            _product(gathered, ends, u, w, alpha, gamma, mean, means, ridge, d, Cd, scores, Hd)
            curvature = _dot(d, Hd)
            if not curvature > 0:
                break
            step = size / curvature
            there, Cthere, y_there = s + step * d, Cs + step * Cd, y + np.float32(step) * scores
            further = _fallen(ends, u, w, alpha, gamma, trust, ridge, g, there, Cthere, y_there)
            if k > 0 and not further - fallen >= fall * 0.5 * step * size:
                break
            s[:], Cs, y, fallen = there, Cthere, y_there, further
            residual -= step * Hd
            _inverted(rows, scaled, precisions, core, ends, own_ridge, residual, z, Cz)
            last, size = size, _dot(residual, z)
            beta = size / last


def sweep(
    weights: list[Tensor],
    x: Float[Tensor, " d"],
    offset: Float[Tensor, " n"],
    alpha: Float[Tensor, " n"],
    gamma: Float[Tensor, " n"],
    log_q: Float[Tensor, " v"],
    log_m: Float[Tensor, "n v"],
    z: Float[Tensor, "n v"],
    log_p: Float[Tensor, " v"],
    log_r: Float[Tensor, "n v"],
    top: Float[Tensor, " m"],
    sums: Float[Tensor, " m"],
    first: Float[Tensor, "2 d"],
) -> None:
    """One row's read of all heads: :class:`softmeet.solvers.sweep._Sweep` with its fields, which are written to.

    Args:
        weights: W_i, (v_i, d_i), fp32, v_i ≤ v.
        x: the raw direction of all members side by side, fp32; ``offset`` is taken off its scores.
        alpha, gamma: of :class:`softmeet.solvers.projection.Projection`, fp64.
        log_q, log_m: the pool and the members, fp64.
        z, log_p, log_r, top, sums, first: fp64; first has, side by side, the moments under p and those under r_i.
    """
    given = [a.numpy() for a in (x, offset, alpha, gamma, log_q, log_m, z, log_p, log_r, top, sums, first)]
    _sweep(_arrays(weights), _ends(weights), *given)


def moments(rows: Float[Tensor, "M d"], u: Float[Tensor, " M"], w: Float[Tensor, " M"]) -> Float[Tensor, "2 d"]:
    """Σ_j u_j rows_j and Σ_j w_j rows_j, by one read; all fp32."""
    out = np.zeros((2, rows.shape[1]), np.float32)
    _moments(rows.numpy(), u.numpy(), w.numpy(), out)
    return torch.from_numpy(out)


def curve(
    rows: list[Tensor],
    x: Float[Tensor, " D"],
    u: Float[Tensor, " M"],
    w: Float[Tensor, "n M"],
    alpha: Float[Tensor, " n"],
    gamma: Float[Tensor, " n"],
) -> tuple[Float[Tensor, "n M"], Float[Tensor, " m"], Float[Tensor, " D"]]:
    """Of one row, with y_i = A_i x_i and t = Σ α_i y_i: y, (n, M); Σ_j u_j t_j and Σ_j w_ij y_ij in one vector; and per
    member Σ_j α_i (u_j t_j + γ_i w_ij y_ij) a_ij, side by side.

    Args:
        rows: A_i, (M, d_i), fp32.
        x, u, w, alpha, gamma: fp32.
    """
    found = np.zeros(w.shape, np.float32), np.zeros(1 + len(w)), np.zeros(len(x), np.float32)
    _curve(_arrays(rows), _ends(rows), *(a.numpy() for a in (x, u, w, alpha, gamma)), *found)
    y, sums, out = (torch.from_numpy(a) for a in found)
    return y, sums, out


@dataclass(frozen=True, eq=False)
class Curved:
    """The Hessian of one row's surrogate: what :func:`curve` needs, and

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

    From the second step on, F, which H and g are of, has to fall by the part ``fall`` of what ½ sᵀHs - gᵀs does.

    The products C_i d that the ridge needs follow from M⁻¹ r, so that of all d × d matrices only C_i⁻¹ is read.
    """
    s = np.zeros(len(g))
    _conjugate(
        _arrays(H.rows), *(a.numpy() for a in (H.u, H.w, H.alpha, H.gamma, H.trust, H.mean, H.means, H.ridge)),
        _arrays(M.rows), _arrays(M.scaled), _arrays(M.precisions), M.core.numpy(), M.ridge.numpy(),
        _ends(H.rows), g.numpy(), reduction, limit, fall, s,
    )  # fmt: skip
    return torch.from_numpy(s)


def _arrays(matrices: list[Tensor]) -> tuple[Any, ...]:
    return tuple(m.detach().numpy() for m in matrices)


def _ends(matrices: list[Tensor]) -> Any:
    return np.cumsum([0] + [m.shape[1] for m in matrices])
