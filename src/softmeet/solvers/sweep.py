"""One read of every head: scores along a direction, and the moments of the distributions where it leads.

Blocks of rows pass once. Each gives the scores of its tokens, their unnormalised masses against a running maximum, and
those masses' moments; normalisers are known at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet import kernels
from softmeet.solvers.parallel import in_parallel
from softmeet.solvers.projection import Projection

# Elements of a block of one head: what stays in a core's cache between its two products; more on an accelerator.
_CACHED_ELEMENTS = 1 << 19
_ACCELERATOR_ELEMENTS = 1 << 24
# Tokens that a core of its own is worth.
_LEAST_SHARE = 4096


@dataclass(frozen=True, eq=False)
class Swept:
    """Where a direction leads: scores z, distributions, dual value, and moments in whitened coordinates.

    ``joint`` and ``own`` are the means of Q_i under p and r_i, all members side by side.
    """

    z: Float[Tensor, "B n v"]
    log_p: Float[Tensor, "B v"]
    log_r: Float[Tensor, "B n v"]
    value: Float[Tensor, " B"]
    joint: Float[Tensor, "B D"]
    own: Float[Tensor, "B D"]
    gradient: Float[Tensor, "B D"]

    def take(self, rows: Int[Tensor, " k"]) -> Swept:
        """Some rows."""
        return Swept(*(getattr(self, f.name)[rows] for f in fields(self)))

    def put(self, rows: Int[Tensor, " k"], other: Swept) -> Swept:
        """With some rows replaced."""
        names = [f.name for f in fields(self)]
        return Swept(*(getattr(self, name).index_copy(0, rows, getattr(other, name)) for name in names))


def sweep(
    problem: Projection,
    z: Float[Tensor, "B n v"],
    direction: Float[Tensor, "B D"] | None = None,
) -> Swept:
    """The point at the scores ``z`` plus those of ``direction``; one read of every head.

    Args:
        problem: the projection.
        z: scores Q_i ν_i to start from; not changed.
        direction: in whitened coordinates; None to stay at ``z``.
    """
    return _Sweep(problem, z.clone(), direction).run()


def block_size(problem: Projection) -> int:
    """Tokens in a block."""
    budget = _CACHED_ELEMENTS if problem.log_q.device.type == "cpu" else _ACCELERATOR_ELEMENTS
    return max(64, budget // max(h.head.d for h in problem.heads))


class _Sweep:
    def __init__(
        self,
        problem: Projection,
        z: Float[Tensor, "B n v"],
        direction: Float[Tensor, "B D"] | None,
    ) -> None:
        self.problem, self.z = problem, z
        self.widths = [h.rank for h in problem.heads]
        B, n = z.shape[:2]
        self.log_p, self.log_r = torch.empty_like(problem.log_q), torch.empty_like(z)
        self.top = z.new_full((B, 1 + n), -torch.inf)
        self.sums = torch.zeros_like(self.top)
        self.first = [z.new_zeros(2, B, h.head.d) for h in problem.heads]
        self.x: list[tuple[Tensor, Tensor]] | None = None
        if direction is not None:
            parts = direction.split(self.widths, dim=-1)
            raw = [h.raw(part) for h, part in zip(problem.heads, parts, strict=True)]
            self.x = [(x.to(h.home, h.dtype), c) for h, (x, c) in zip(problem.heads, raw, strict=True)]

    def run(self) -> Swept:
        if self._fits_compiled_loops():
            self._compiled()
        else:
            size, v = block_size(self.problem), self.z.shape[-1]
            for start in range(0, v, size):
                self._block(slice(start, min(start + size, v)))
        for h in self.problem.heads:
            h.rows_read += h.head.v
        return self._finish()

    def _fits_compiled_loops(self) -> bool:
        heads = self.problem.heads
        plain = all(h.slope is None and h.dtype == torch.float32 for h in heads)
        return plain and self.z.device.type == "cpu" and kernels.fits(*[h.head.weight for h in heads])

    def _compiled(self) -> None:
        """A share of the tokens for each core."""
        v, n = self.z.shape[-1], self.z.shape[1]
        size = max(_LEAST_SHARE, -(-v // torch.get_num_threads()))
        shares = [slice(start, min(start + size, v)) for start in range(0, v, size)]
        tops, sums, firsts = zip(*in_parallel(self._share, shares, self.z.device), strict=True)
        self.top = torch.stack(tops).amax(0)
        scales = [(top - self.top).nan_to_num(nan=0.0).exp() for top in tops]
        self.sums = sum((s * scale for s, scale in zip(sums, scales, strict=True)), torch.zeros_like(self.top))
        for first, scale in zip(firsts, scales, strict=True):
            parts = first.split([h.head.d for h in self.problem.heads], dim=-1)
            for i in range(n):
                self.first[i] += (parts[i] * scale[:, [0, 1 + i], None]).transpose(0, 1)

    def _share(self, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        problem, z = self.problem, self.z
        x, offset = None, z.new_zeros(z.shape[:2])
        if self.x is not None:
            x, offset = [a.contiguous() for a, _ in self.x], torch.stack([c for _, c in self.x], dim=-1)
        return kernels.sweep(
            [h.head.weight for h in problem.heads],
            tokens,
            x,
            offset,
            z.new_tensor(problem.alpha),
            z.new_tensor(problem.gamma),
            problem.log_q,
            problem.log_p,
            z,
            self.log_p,
            self.log_r,
        )

    def _block(self, tokens: slice) -> None:
        problem = self.problem
        blocks = [h.block(tokens) for h in problem.heads]
        if self.x is not None:
            for i, (h, W) in enumerate(zip(problem.heads, blocks, strict=True)):
                x, offset = self.x[i]
                y = (x @ W.T).to(self.z.device, self.z.dtype) - offset[:, None]
                y = y if h.slope is None else y * h.slope[:, tokens.start : tokens.start + len(W)]
                self.z[:, i, tokens.start : tokens.start + len(W)] += y
        z = self.z[..., tokens]
        self.log_p[:, tokens] = problem.log_q[:, tokens] + problem.tilt(z)
        torch.sub(problem.log_p[..., tokens], problem.weighted(z, problem.gamma), out=self.log_r[..., tokens])
        masses = self._masses(tokens)
        for i, (h, W) in enumerate(zip(problem.heads, blocks, strict=True)):
            m = torch.stack([masses[:, 0], masses[:, 1 + i]])[..., : len(W)]
            m = m if h.slope is None else m * h.slope[:, tokens.start : tokens.start + len(W)]
            product = m.flatten(0, 1).to(h.home, h.dtype) @ W
            self.first[i] += product.view(2, -1, h.head.d).to(self.z.device, self.z.dtype)

    def _masses(self, tokens: slice) -> Float[Tensor, "B _ b"]:
        """exp(log masses - the maximum so far); what was summed before is scaled to the new maximum."""
        logs = torch.cat([self.log_p[:, None, tokens], self.log_r[..., tokens]], dim=1)
        top = torch.maximum(self.top, logs.amax(-1))
        if top.device.type != "cpu" or bool((top > self.top).any()):
            scale = (self.top - top).nan_to_num(nan=0.0).exp()
            self.sums *= scale
            for i, total in enumerate(self.first):
                total *= torch.stack([scale[:, 0], scale[:, 1 + i]])[..., None]
            self.top = top
        masses: Tensor = (logs - self.top.clamp_min(torch.finfo(top.dtype).min)[..., None]).exp()
        self.sums += masses.sum(-1)
        return masses

    def _finish(self) -> Swept:
        problem = self.problem
        log_sums = self.top + self.sums.log()
        self.log_p -= log_sums[:, :1]
        self.log_r -= log_sums[:, 1:, None]
        value = log_sums[:, 0]
        for i, rho in enumerate(problem.trust):
            if math.isinf(rho):
                value = value - (problem.log_p[:, i].exp() * self.z[:, i]).sum(-1)
            else:
                value = value + rho * log_sums[:, 1 + i]
        joint, own = [], []
        for i, (h, total) in enumerate(zip(problem.heads, self.first, strict=True)):
            present = 1.0 if h.slope is not None else torch.stack([self._present(h.head.v, k) for k in (0, 1 + i)])
            mean = total / torch.stack([self.sums[:, 0], self.sums[:, 1 + i]])[..., None]
            white = (mean - present * h.whitening.center) @ h.whitening.factor
            joint.append(white[0])
            own.append(white[1])
        p_mean, r_mean = torch.cat(joint, dim=-1), torch.cat(own, dim=-1)
        gradient = problem.scaled(p_mean - r_mean)
        return Swept(self.z, self.log_p, self.log_r, value, p_mean, r_mean, gradient)

    def _present(self, v: int, k: int) -> Float[Tensor, "B 1"]:
        """The mass of distribution k (0 for p, i + 1 for r_i) on the first ``v`` tokens."""
        if v == self.z.shape[-1]:
            return torch.ones_like(self.sums[:, :1])
        logs = self.log_p if k == 0 else self.log_r[:, k - 1]
        return logs[:, :v].exp().sum(-1, keepdim=True)
