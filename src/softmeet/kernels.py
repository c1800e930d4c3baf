"""Compiled loops for processors: a block of rows is read once, for a product with it and one with its transpose.

Two library calls would read the matrix twice, which is what a row alone spends its time on. numba is optional
(``pip install 'softmeet[fast]'``); without it, or where :func:`fits` says no, callers use torch, with the same results
to rounding.
"""

from __future__ import annotations

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
    def _curve(rows, x, u, w, alpha, gamma, sums, out):  # type: ignore[no-untyped-def]
        n, M = w.shape
        y = np.zeros((n, _TOKENS), np.float32)
        c = np.zeros(_TOKENS, np.float32)
        joint = np.zeros(_TOKENS, np.float32)
        for start in range(0, M, _TOKENS):
            size = min(_TOKENS, M - start)
            joint[:] = 0
            for i in range(n):
                _dots(rows[i][start : start + size], x[i], y[i])
                joint += alpha[i] * y[i]
            for k in range(size):
                sums[0] += u[start + k] * joint[k]
            for i in range(n):
                for k in range(size):
                    j = start + k
                    sums[1 + i] += w[i, j] * y[i, k]
                    c[k] = alpha[i] * (u[j] * joint[k] + gamma[i] * w[i, j] * y[i, k])
                _add(rows[i][start : start + size], c, out[i])


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
    ends = np.cumsum([0] + [W.shape[1] for W in weights])
    heads = tuple(W.detach().numpy() for W in weights)
    given = [a.numpy() for a in (x, offset, alpha, gamma, log_q, log_m, z, log_p, log_r, top, sums, first)]
    _sweep(heads, ends, *given)


def moments(rows: Float[Tensor, "M d"], u: Float[Tensor, " M"], w: Float[Tensor, " M"]) -> Float[Tensor, "2 d"]:
    """Σ_j u_j rows_j and Σ_j w_j rows_j, by one read; all fp32."""
    out = np.zeros((2, rows.shape[1]), np.float32)
    _moments(rows.numpy(), u.numpy(), w.numpy(), out)
    return torch.from_numpy(out)


def curve(
    rows: list[Tensor],
    x: list[Tensor],
    u: Float[Tensor, " M"],
    w: Float[Tensor, "n M"],
    alpha: Float[Tensor, " n"],
    gamma: Float[Tensor, " n"],
) -> tuple[Float[Tensor, " m"], list[Float[Tensor, " d"]]]:
    """Of one row, with y_i = A_i x_i and t = Σ α_i y_i: Σ_j u_j t_j and Σ_j w_ij y_ij in one vector; and per member
    Σ_j α_i (u_j t_j + γ_i w_ij y_ij) a_ij.

    Args:
        rows: A_i, (M, d_i), fp32. x: (d_i,) each, fp32.
        u, w, alpha, gamma: fp32.
    """
    sums = np.zeros(1 + len(w))
    out = tuple(np.zeros(a.shape[1], np.float32) for a in rows)
    given = [a.numpy() for a in (u, w, alpha, gamma)]
    _curve(tuple(a.numpy() for a in rows), tuple(a.numpy() for a in x), *given, sums, out)
    return torch.from_numpy(sums), [torch.from_numpy(o) for o in out]
