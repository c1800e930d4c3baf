"""Measures, without labels, of how far ``meet`` moves the pool.

With q the pool, p̂_i the members, ρ_i their trusts, p° the optimal answer, r_i° the corrected members and V the value of
the objective there, KL(q‖p°) + Σ ρ_i KL(q‖r_i°) = Σ ρ_i KL(q‖p̂_i) - V: the *excess*. If it is 0, every member's
head can express the pool, and ``meet`` answers with the pool (docs/theory/agreement.md#movement).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.rules.solution import Solution
from softmeet.simplex import kl, total_variation

# The quantiles over positions that are reported.
_QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95}


@dataclass(frozen=True, eq=False)
class Movement:
    """How far a rule's answer p° is from the pool q at B positions; in nats, but for the total variation.

    :meth:`of` makes it of a solution; each attribute has one element per position.

    Attributes:
        forward: KL(p°‖q).
        backward: KL(q‖p°).
        total_variation: ½ Σ |p° - q|, from 0 to 1.
        free: Σ_i ρ_i KL(q‖p̂_i), with members p̂_i and trusts ρ_i; it is known without reading a head.
        excess: ``free`` - V, with V the value of the rule's objective at p°; 0 shows that all heads can express q.
    """

    forward: Float[Tensor, " B"]
    backward: Float[Tensor, " B"]
    total_variation: Float[Tensor, " B"]
    free: Float[Tensor, " B"]
    excess: Float[Tensor, " B"]

    @staticmethod
    def of(solution: Solution) -> Movement | None:
        """Measure a solution; return None if its rule's ``tilts_pool`` is False, or a trust is infinite.

        Every row is measured, as fp64 tensors on the CPU. The solution's distribution counts as p°, so it should have
        been solved without a gate, to a small ``tol`` and at temperature 1, which is not checked.
        """
        problem = solution.problem
        rule, trust = problem.settings.rule, problem.settings.rule.effective_trust(problem.trust)
        if not rule.tilts_pool or any(map(math.isinf, trust)):
            return None
        log_p = solution.log_probs.reshape(problem.log_pool.shape).double()
        log_q, free = problem.log_pool, problem.pool_bound()
        return Movement(
            forward=kl(log_p, log_q).clamp_min(0).cpu(),
            backward=kl(log_q, log_p).clamp_min(0).cpu(),
            total_variation=total_variation(log_p, log_q).cpu(),
            free=free.cpu(),
            excess=(free - solution.objective.reshape(-1)).clamp_min(0).cpu(),
        )

    @staticmethod
    def stacked(rows: Float[Tensor, "B 5"]) -> Movement:
        """Build the measures from the columns of a :meth:`table`: forward, backward, total_variation, free, excess."""
        return Movement(*rows.unbind(-1))

    def table(self) -> Float[Tensor, "B 5"]:
        """Return the measures as columns: forward, backward, total_variation, free, excess."""
        return torch.stack([getattr(self, f.name) for f in fields(self)], dim=-1)

    def figures(self) -> dict[str, Any]:
        """Summarise the measures over all B positions, of which there must be at least one.

        Returns:
            For each measure by name, a dict of its ``mean``, ``5 %``, ``median`` and ``95 %``; the number of
            ``positions``; and ``says``, a sentence with the means.
        """
        found: dict[str, Any] = {}
        for f in fields(self):
            values = getattr(self, f.name).double()
            found[f.name] = {"mean": values.mean().item()}
            found[f.name] |= {name: values.quantile(q).item() for name, q in _QUANTILES.items()}
        nats, apart = self.forward.mean().item(), self.total_variation.mean().item()
        says = f"meet moves the average by {nats:.4f} nats a token (total variation {apart:.1%})."
        return found | {"positions": len(self.free), "says": says}
