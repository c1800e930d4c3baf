"""Compiled loops for processors: a block of rows is read once, for a product with it and one with its transpose.

Two library calls would read the matrix twice, which is what a row alone spends its time on. numba is optional
(``pip install 'softmeet[fast]'``); without it, or where :func:`fits` says no, callers use torch, with the same results
to rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
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
    for m in matrices:
        if m.device.type != "cpu" or m.dtype != torch.float32 or not m.is_contiguous():
            return False
    return ENABLED


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

    @_sums
    def _dots_of_four(rows, w, x, y, z, out):  # type: ignore[no-untyped-def]
        """:func:`_dots` with four vectors: each row is loaded once for all of them."""
        M, d = rows.shape
        for j in range(0, M - M % 4, 4):
            a, b, c, e = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
            aw, ax, ay, az = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            bw, bx, by, bz = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            cw, cx, cy, cz = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            ew, ex, ey, ez = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for k in range(d):
                aw, ax, ay, az = aw + a[k] * w[k], ax + a[k] * x[k], ay + a[k] * y[k], az + a[k] * z[k]
                bw, bx, by, bz = bw + b[k] * w[k], bx + b[k] * x[k], by + b[k] * y[k], bz + b[k] * z[k]
                cw, cx, cy, cz = cw + c[k] * w[k], cx + c[k] * x[k], cy + c[k] * y[k], cz + c[k] * z[k]
                ew, ex, ey, ez = ew + e[k] * w[k], ex + e[k] * x[k], ey + e[k] * y[k], ez + e[k] * z[k]
            out[0, j], out[1, j], out[2, j], out[3, j] = aw, ax, ay, az
            out[0, j + 1], out[1, j + 1], out[2, j + 1], out[3, j + 1] = bw, bx, by, bz
            out[0, j + 2], out[1, j + 2], out[2, j + 2], out[3, j + 2] = cw, cx, cy, cz
            out[0, j + 3], out[1, j + 3], out[2, j + 3], out[3, j + 3] = ew, ex, ey, ez
        rest = slice(M - M % 4, M)
        _dots(rows[rest], w, out[0, rest])
        _dots(rows[rest], x, out[1, rest])
        _dots(rows[rest], y, out[2, rest])
        _dots(rows[rest], z, out[3, rest])

    @_sums
    def _add_four(rows, m, n, o, p, out_m, out_n, out_o, out_p):  # type: ignore[no-untyped-def]
        """:func:`_add_both` for four sets of masses."""
        M, d = rows.shape
        for j in range(0, M - M % 4, 4):
            a, b, c, e = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
            ma, mb, mc, me = m[j], m[j + 1], m[j + 2], m[j + 3]
            na, nb, nc, ne = n[j], n[j + 1], n[j + 2], n[j + 3]
            oa, ob, oc, oe = o[j], o[j + 1], o[j + 2], o[j + 3]
            pa, pb, pc, pe = p[j], p[j + 1], p[j + 2], p[j + 3]
            for k in range(d):
                out_m[k] += ma * a[k] + mb * b[k] + mc * c[k] + me * e[k]
                out_n[k] += na * a[k] + nb * b[k] + nc * c[k] + ne * e[k]
                out_o[k] += oa * a[k] + ob * b[k] + oc * c[k] + oe * e[k]
                out_p[k] += pa * a[k] + pb * b[k] + pc * c[k] + pe * e[k]
        rest = slice(M - M % 4, M)
        _add_both(rows[rest], m[rest], n[rest], out_m, out_n)
        _add_both(rows[rest], o[rest], p[rest], out_o, out_p)

    @_plain
    def _dots_of_all(rows, x, out):  # type: ignore[no-untyped-def]
        """:func:`_dots` with the vectors x_b."""
        B = len(x)
        for b in range(0, B - B % 4, 4):
            _dots_of_four(rows, x[b], x[b + 1], x[b + 2], x[b + 3], out[b : b + 4])
        for b in range(B - B % 4, B):
            _dots(rows, x[b], out[b])

    @_plain
    def _add_all(rows, masses, i, place, out):  # type: ignore[no-untyped-def]
        """The moments of the rows under p and r_i of every row of the batch."""
        B = len(masses)
        for b in range(0, B - 1, 2):
            c = b + 1
            _add_four(
                rows, masses[b, 0], masses[b, 1 + i], masses[c, 0], masses[c, 1 + i],
                out[b, 0, place], out[b, 1, place], out[c, 0, place], out[c, 1, place],
            )  # fmt: skip
        for b in range(B - B % 2, B):
            _add_both(rows, masses[b, 0], masses[b, 1 + i], out[b, 0, place], out[b, 1, place])

    @_plain
    def _raise_top(i, best, ends, top, sums, first):  # type: ignore[no-untyped-def]
        """Scale what was summed for distribution i to a new maximum."""
        scale = np.exp(top[i] - best)
        top[i] = best
        sums[i] *= scale
        if i == 0:
            first[0] *= scale
        else:
            first[1, ends[i - 1] : ends[i]] *= scale

    @_plain
    def _weigh(logs, i, ends, top, sums, first, masses):  # type: ignore[no-untyped-def]
        """Masses of a block of tokens under distribution i, against its maximum so far."""
        best = logs.max()
        if best > top[i]:
            _raise_top(i, best, ends, top, sums, first)
        total = 0.0
        for k in range(len(logs)):
            m = np.exp(logs[k] - top[i]) if logs[k] > -np.inf else 0.0
            total += m
            masses[k] = m
        sums[i] += total

    @_plain
    def _move(rows, start, x, offset, dots, z):  # type: ignore[no-untyped-def]
        """Add the scores of a block of tokens."""
        _dots_of_all(rows, x, dots)
        for b in range(len(x)):
            for k in range(len(rows)):
                z[b, start + k] += dots[b, k] - offset[b]

    @_plain
    def _tilt(begin, end, alpha, gamma, log_q, log_m, z, log_p, log_r):  # type: ignore[no-untyped-def]
        """The log masses of some tokens, for one row of the batch."""
        for j in range(begin, end):
            t = log_q[j]
            for i in range(len(alpha)):
                t += alpha[i] * z[i, j]
            log_p[j] = t
        for i in range(len(alpha)):
            for j in range(begin, end):
                log_r[i, j] = log_m[i, j] - gamma[i] * z[i, j]

    @_plain
    def _sweep(  # type: ignore[no-untyped-def]
        weights, ends, begin, end, moves, x, offset, alpha, gamma, log_q, log_m, z, log_p, log_r, top, sums, first
    ):
        B, n = offset.shape
        dots, masses = np.zeros((B, _TOKENS), np.float32), np.zeros((B, 1 + n, _TOKENS), np.float32)
        block = np.zeros(first.shape, np.float32)
        for start in range(begin, end, _TOKENS):
            tokens = slice(start, min(start + _TOKENS, end))
            if moves:
                for i in range(n):
                    _move(weights[i][tokens], start, x[i], offset[:, i], dots, z[:, i])
            for b in range(B):
                _tilt(start, tokens.stop, alpha, gamma, log_q[b], log_m[b], z[b], log_p[b], log_r[b])
                _weigh(log_p[b, tokens], 0, ends, top[b], sums[b], first[b], masses[b, 0])
                for i in range(n):
                    _weigh(log_r[b, i, tokens], 1 + i, ends, top[b], sums[b], first[b], masses[b, 1 + i])
            block[:] = 0
            for i in range(n):
                _add_all(weights[i][tokens], masses, i, slice(ends[i], ends[i + 1]), block)
            first += block

    @_plain
    def _centred(weight, tokens, center, out):  # type: ignore[no-untyped-def]
        for k in range(len(tokens)):
            row, found = weight[tokens[k]], out[k]
            for j in range(len(center)):
                found[j] = row[j] - center[j]

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


def sweep(
    weights: list[Tensor],
    tokens: slice,
    x: list[Tensor] | None,
    offset: Float[Tensor, "B n"],
    alpha: Float[Tensor, " n"],
    gamma: Float[Tensor, " n"],
    log_q: Float[Tensor, "B v"],
    log_m: Float[Tensor, "B n v"],
    z: Float[Tensor, "B n v"],
    log_p: Float[Tensor, "B v"],
    log_r: Float[Tensor, "B n v"],
) -> tuple[Float[Tensor, "B m"], Float[Tensor, "B m"], Float[Tensor, "B 2 D"]]:
    """A read of some tokens of all heads: what :class:`softmeet.solvers.sweep._Sweep` does block by block.

    Args:
        weights: W_i, (v_i, d_i), fp32, v_i ≤ v.
        tokens: those to read.
        x: raw directions, (B, d_i), fp32, None to stay; ``offset`` is taken off their scores.
        alpha, gamma: of :class:`softmeet.solvers.projection.Projection`, fp64.
        log_q, log_m: the pool and the members, fp64.
        z, log_p, log_r: fp64, written to.

    Returns:
        The largest log masses of p and each r_i, the masses' sums against these, and their moments, those under p and
        those under r_i, all members side by side.
    """
    B, n = z.shape[:2]
    ends, moves = ends_of(weights), x is not None
    directions = arrays(weights if x is None else x)
    top, sums, first = np.full((B, 1 + n), -np.inf), np.zeros((B, 1 + n)), np.zeros((B, 2, ends[-1]))
    given = [a.numpy() for a in (offset, alpha, gamma, log_q, log_m, z, log_p, log_r)]
    _sweep(arrays(weights), ends, tokens.start, tokens.stop, moves, directions, *given, top, sums, first)
    return torch.from_numpy(top), torch.from_numpy(sums), torch.from_numpy(first)


def centred(
    weight: Float[Tensor, "v d"], tokens: Int[Tensor, " k"], center: Float[Tensor, " d"]
) -> Float[Tensor, "k d"]:
    """Some rows of ``weight`` less ``center``, by one read and one write; all fp32."""
    out = torch.empty(len(tokens), len(center), dtype=torch.float32)
    _centred(weight.detach().numpy(), tokens.numpy(), center.numpy(), out.numpy())
    return out


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
    _curve(arrays(rows), ends_of(rows), *(a.numpy() for a in (x, u, w, alpha, gamma)), *found)
    y, sums, out = (torch.from_numpy(a) for a in found)
    return y, sums, out


def arrays(matrices: list[Tensor]) -> tuple[Any, ...]:
    """As numpy arrays that share their memory."""
    return tuple([m.detach().numpy() for m in matrices])


def ends_of(matrices: list[Tensor]) -> Any:
    """Where each one's columns begin and end, all side by side."""
    return np.cumsum([0] + [m.shape[1] for m in matrices])
