"""One read of every head: scores along a direction, and the moments of the distributions where it leads.

Blocks of rows pass once. Each gives the scores of its tokens, their unnormalised masses against a running maximum, and
those masses' moments; normalisers are known at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.solvers.projection import Projection

# Elements of a block of one head: what stays in a core's cache between its two products; more on an accelerator.
_CACHED_ELEMENTS = 1 << 19
_ACCELERATOR_ELEMENTS = 1 << 24


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
    return max(64, budget // max([h.head.d for h in problem.heads]))


def blocks(problem: Projection) -> list[slice]:
    """All tokens, a block at a time."""
    size, v = block_size(problem), problem.log_q.shape[-1]
    return [slice(start, min(start + size, v)) for start in range(0, v, size)]


class _Sweep:
    def __init__(
        self,
        problem: Projection,
        z: Float[Tensor, "B n v"],
        direction: Float[Tensor, "B D"] | None,
    ) -> None:
        self.problem, self.z = problem, z
        B, n = z.shape[:2]
        self.log_p, self.log_r = torch.empty_like(problem.log_q), torch.empty_like(z)
        self.top = z.new_full((B, 1 + n), -torch.inf)
        self.sums = torch.zeros_like(self.top)
        self.first = [z.new_zeros(2, B, h.head.d) for h in problem.heads]
        self.x: list[Tensor] | None = None
        self.offset = z.new_zeros(B, n)
        if direction is not None:
            self.x = []
            for i, (h, part) in enumerate(zip(problem.heads, direction.split(problem.widths, dim=-1), strict=True)):
                x = part @ h.whitening.factor.T
                self.offset[:, i] = x @ h.whitening.center
                self.x.append(x.to(h.home, h.dtype).contiguous())

    def run(self) -> Swept:
        for tokens in blocks(self.problem):
            self._block(tokens)
        for h in self.problem.heads:
            h.rows_read[h.at] += h.head.v
        return self._finish()

    def _block(self, tokens: slice) -> None:
        problem = self.problem
        blocks = [h.block(tokens) for h in problem.heads]
        if self.x is not None:
            for i, (h, W) in enumerate(zip(problem.heads, blocks, strict=True)):
                y = (self.x[i] @ W.T).to(self.z.device, self.z.dtype) - self.offset[:, i, None]
                y = y if h.slope is None else y * h.slope[:, tokens.start : tokens.start + len(W)]
                self.z[:, i, tokens.start : tokens.start + len(W)] += y
        z = self.z[..., tokens]
        self.log_p[:, tokens] = problem.log_q[:, tokens] + problem.tilt(z)
        torch.sub(problem.log_p[..., tokens], problem.gamma[:, None] * z, out=self.log_r[..., tokens])
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
        value = problem.value(log_sums[:, 0], log_sums[:, 1:], self.z)
        means = []
        for i, (h, total) in enumerate(zip(problem.heads, self.first, strict=True)):
            mean, center = total / self.sums[:, [0, 1 + i]].T[..., None], h.whitening.center
            if h.head.v < self.z.shape[-1]:
                # Only the mass on the head's own tokens is centred.
                some = torch.stack([self.log_p, self.log_r[:, i]])[..., : h.head.v]
                center = some.exp().sum(-1, keepdim=True) * center
            means.append((mean - center) @ h.whitening.factor)
        p_mean, r_mean = torch.cat(means, dim=-1)
        return Swept(self.z, self.log_p, self.log_r, value, p_mean, r_mean, problem.scale * (p_mean - r_mean))
