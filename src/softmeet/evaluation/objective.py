"""The loss that a fit minimises: nats per token at some positions, with its gradient, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmeet.evaluation.parameters import Layout
from softmeet.evaluation.perplexity import chunk_size
from softmeet.evaluation.positions import PIECE, Positions
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.rules.combine import product_dtype
from softmeet.rules.meet import full_hessian_pays
from softmeet.rules.problem import Problem
from softmeet.rules.settings import Pool, Settings
from softmeet.scaling.base import Engine
from softmeet.simplex import log_normalize
from softmeet.solvers.base import iterate
from softmeet.solvers.dense import dense
from softmeet.solvers.dual import DualState
from softmeet.solvers.implicit import projected
from softmeet.solvers.newton import DualNewton
from softmeet.solvers.projection import Projection

_MAX_STEPS = 50
# Elements of log-probabilities that an average's loss works on at once: what stays in a core's cache.
_CACHED_ELEMENTS = 1 << 18
# The share of the machine's memory that log-probabilities may take between evaluations instead of being made again.
_KEPT = 0.4


def solve(problem: Projection) -> DualState:
    """As the rule ``meet`` does, without certificates of wide heads, nor its rescue of rows in trouble."""
    if full_hessian_pays(problem):
        return iterate(DualNewton(), problem, _MAX_STEPS)
    return dense(problem, _MAX_STEPS, certify=False)


@dataclass
class Objective:
    """Mean nats per token of a pool, or of ``meet`` from that pool where the layout has trusts.

    Args:
        model: the members' heads.
        positions: of the text to fit on.
        layout: of the parameters.
        pool: which average.
        members: those that take part, by index; all if None.
        bands: of principal directions, each with a trust of its own.
        trusted: members whose moments count, by index, in the order of the layout's trusts; all if None.
        tol: of the solver, in nats.
        keep: log-probabilities between evaluations, instead of making them again from hidden states.
    """

    model: EnsembleForCausalLM
    positions: Positions
    layout: Layout
    pool: Pool
    members: Sequence[int] | None = None
    bands: int = 1
    trusted: Sequence[int] | None = None
    tol: float = 1e-4
    keep: bool = True

    def __post_init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, theta: Float[Tensor, " k"]) -> tuple[float, Float[Tensor, " k"]]:
        """(loss, gradient) at a vector of parameters."""
        total, gradient = self.sums(theta)
        return total / len(self.positions), gradient / len(self.positions)

    def sums(self, theta: Float[Tensor, " k"]) -> tuple[float, Float[Tensor, " k"]]:
        """Sums over positions of the same."""
        total, gradient = 0.0, torch.zeros_like(theta)
        for k, chunk in enumerate(self.positions.chunks(chunk_size(self.model.config.vocab_size))):
            log_p, logits = self._log_probs(k, chunk)
            at_once = len(chunk) if self.layout.trusts else max(1, _CACHED_ELEMENTS // self.model.config.vocab_size)
            for start in range(0, len(chunk), at_once):
                some = slice(start, start + at_once)
                leaf = theta.detach().clone().requires_grad_()
                own = None if logits is None else logits[:, some]
                loss = self.losses(leaf, log_p[:, some], own, chunk.targets[some]).sum()
                gradient += torch.autograd.grad(loss, leaf)[0]
                total += loss.item()
        return total, gradient

    def losses(
        self, theta: Float[Tensor, " k"], log_p: Float[Tensor, "n B v"], logits: Tensor | None, targets: Tensor
    ) -> Float[Tensor, " B"]:
        """-log p(target) of each row, differentiable in ``theta``."""
        weights, temperature, trust = self.layout.unpack(theta)
        # A logit mean takes the temperature into its weights, which saves two thirds of the time.
        folded = self.pool == "logit-mean" and not self.layout.trusts
        # Sums over the vocabulary of single precision would leave an error of a hundredth in the weights' gradient.
        scores = pooled(
            self.pool, log_p.double(), weights / temperature if folded else weights, self.model.combiner.support
        )
        scores = self._met(scores, trust, log_p, logits) if self.layout.trusts else scores
        return nn.functional.cross_entropy(scores if folded else scores / temperature, targets, reduction="none")

    def _met(
        self, log_q: Float[Tensor, "B v"], trust: Tensor, log_p: Float[Tensor, "n B v"], logits: Tensor | None
    ) -> Float[Tensor, "B v"]:
        who = range(len(log_p)) if self.trusted is None else self.trusted
        banded = [i for i in who for _ in range(self.bands)]
        log_p, logits = log_p[banded], None if logits is None else logits[banded]
        problem = self._problem(log_p, logits)
        everyone = list(range(len(log_p)))
        projection = problem.projection(everyone, problem.trust)
        # Outside the support that all members share the projection has no say: zero there from the start.
        shared = (~problem.log_p.isneginf()).all(0)
        log_q = log_normalize(torch.where(shared & ~log_q.isneginf(), log_q, -torch.inf))
        return projected(replace(projection, log_q=log_q, tol=self.tol), trust, solve)

    def _problem(self, log_p: Float[Tensor, "n B v"], logits: Tensor | None) -> Problem:
        heads = self.model.combiner.banded_heads(self.bands)
        if self.trusted is not None:
            heads = [heads[i * self.bands + band] for i in self.trusted for band in range(self.bands)]
        slopes = tuple(
            None if head.soft_cap is None or logits is None else head.slope(logits[i].double())
            for i, head in enumerate(heads)
        )
        return Problem(
            log_p=log_normalize(log_p.double()),
            heads=tuple(heads),
            slopes=slopes,
            settings=Settings(trust=1.0, pool="prob-mean", tol=self.tol, max_steps=_MAX_STEPS).for_members(len(log_p)),
            support=self.model.combiner.support,
            dtype=product_dtype(torch.float32, self.tol),
        )

    @torch.no_grad()
    def _log_probs(self, k: int, chunk: Positions) -> tuple[Tensor, Tensor | None]:
        if k in self._kept:
            return self._kept[k]
        log_p, logits = self.model.combiner.own_log_probs(chunk.hidden)
        if self.members is not None:
            some = list(self.members)
            log_p, logits = log_p[some], None if logits is None else logits[some]
        if self.keep:
            self._kept[k] = log_p, logits
        return log_p, logits


class Loss:
    """An objective whose positions are dealt out in pieces, and put together in their order.

    Args:
        engine: where the pieces go.
        model, positions, layout, pool, options: as :class:`Objective` has them.
        on_progress: called with the number of positions of each piece.
    """

    def __init__(
        self,
        engine: Engine,
        model: EnsembleForCausalLM,
        positions: Positions,
        layout: Layout,
        pool: Pool,
        *,
        on_progress: Callable[[int], None] = lambda positions: None,
        **options: Any,
    ) -> None:
        self.layout, self._engine, self._count, self._on_progress = layout, engine, len(positions), on_progress
        members = len(options.get("members") or model.heads)
        keep = 4 * members * model.config.vocab_size * len(positions) <= _KEPT * psutil.virtual_memory().total
        # Pieces of wide heads are smaller, so that a minibatch goes to every worker.
        parts = list(positions.chunks(min(PIECE, 2 * chunk_size(model.config.vocab_size))))
        self._sizes = [len(part) for part in parts]
        self._pieces = engine.keep([Objective(model, part, layout, pool, keep=keep, **options) for part in parts])

    def __call__(self, theta: Float[Tensor, " k"]) -> tuple[float, Float[Tensor, " k"]]:
        """(loss, gradient) at a vector of parameters."""
        found = {}
        for k, sums in self._engine.map(Objective.sums, [(piece, theta) for piece in self._pieces]):
            found[k] = sums
            self._on_progress(self._sizes[k])
        total, gradient = 0.0, torch.zeros_like(theta)
        for k in range(len(found)):
            total, gradient = total + found[k][0], gradient + found[k][1]
        return total / self._count, gradient / self._count


def pooled(
    pool: Pool, log_p: Float[Tensor, "n B v"], weights: Float[Tensor, " n"], support: Tensor | None
) -> Float[Tensor, "B v"]:
    """Log-probabilities of a pool up to a constant, differentiable in the weights; zero where a member's is.

    (A probability mean keeps tokens that some member excludes, as :func:`softmeet.simplex.prob_mean` does.)
    """
    if pool == "logit-mean":
        # Without zeros, as a rule, nothing has to be kept out of the sum.
        zero = log_p.isneginf() if bool(log_p.amin().isneginf()) else None
        scores = torch.einsum("n,nbv->bv", weights, log_p if zero is None else log_p.masked_fill(zero, 0.0))
        scores = scores if zero is None else scores.masked_fill(zero.any(0), -torch.inf)
    else:
        scores = (log_p + weights.log()[:, None, None]).logsumexp(0)
    return scores if support is None else scores.masked_fill(~support, -torch.inf)
