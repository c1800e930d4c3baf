"""The loss of ``meet`` with its gradient in a fit's parameters, in chunks of bounded memory, and its minimum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmeet.evaluation.average import means
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.layout import Layout, Values
from softmeet.evaluation.perplexity import chunk_size
from softmeet.evaluation.positions import PIECE, Positions
from softmeet.evaluation.scoring import HELD
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.rules.combine import product_dtype
from softmeet.rules.problem import Problem
from softmeet.rules.settings import Settings
from softmeet.rules.validate import slopes_of
from softmeet.rules.values import POOLS, Pool
from softmeet.scaling.base import Engine
from softmeet.simplex import log_normalize
from softmeet.solvers.dual import DualState
from softmeet.solvers.implicit import projected
from softmeet.solvers.minimise import minimise_dual
from softmeet.solvers.projection import Projection

LossAndGradient = Callable[[Float[Tensor, " k"]], tuple[float, Float[Tensor, " k"]]]

_MAX_STEPS = 50
# L-BFGS's first step is as long as the gradient, which is about right with losses in twentieths of a nat.
_UNIT = 20.0
# Adam's first step, in the logarithms that are learnt; it falls to zero along half a cosine.
_RATE = 0.2


def _solve(problem: Projection) -> DualState:
    """Solve as the rule ``meet`` does, but without certificates for wide heads or a second try for failed rows."""
    return minimise_dual(problem, _MAX_STEPS, certify=False, rescue=False)


@dataclass
class Objective:
    """The loss -log p(target) of ``meet``, as a function of θ.

    θ is the vector of parameters that ``layout`` describes.

    Attributes:
        model: the ensemble, for its members' heads.
        positions: those of the text to fit on, with hidden states, as :func:`observe_text` returns them.
        layout: the parameters in θ, with a trust for each of the ``trusted`` members.
        pool: the average from which ``meet`` starts, ``"logit-mean"`` or ``"prob-mean"``.
        trusted: indices of the members whose moments ``meet`` constrains, in the order of the layout's
            trusts; None for all.
        tol: the solver's tolerance, in nats.
        keep: whether log-probabilities are kept between evaluations, rather than computed again from hidden states.
    """

    model: EnsembleForCausalLM
    positions: Positions
    layout: Layout
    pool: Pool
    trusted: Sequence[int] | None = None
    tol: float = 1e-4
    keep: bool = True
    _held: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict, init=False)

    def sums(self, theta: Float[Tensor, " k"]) -> tuple[float, Float[Tensor, " k"]]:
        """Return (the loss in nats, summed over all positions; its gradient in θ, (k,), fp64), at ``theta``, (k,)."""
        total, gradient, v = 0.0, torch.zeros_like(theta), self.model.config.vocab_size
        for k, chunk in enumerate(self.positions.chunks(chunk_size(v))):
            leaf = theta.detach().clone().requires_grad_()
            loss = self.losses(leaf, *self._log_probs(k, chunk), chunk.targets).sum()
            gradient += torch.autograd.grad(loss, leaf)[0]
            total += loss.item()
        return total, gradient

    def losses(
        self, theta: Float[Tensor, " k"], log_p: Float[Tensor, "n B v"], logits: Tensor | None, targets: Tensor
    ) -> Float[Tensor, " B"]:
        """Return -log p(target) of each row in nats, (B,), differentiable in ``theta``.

        Args:
            theta: the parameters θ, (k,), fp64, as ``layout`` describes them.
            log_p: (n, B, v), the members' log-probabilities in nats, as :meth:`Combiner.own_log_probs` returns them.
            logits: their logits, (n, B, v), if a head has a soft-cap; else None.
            targets: the ids of the tokens that came, (B,), int64.
        """
        parts = self.layout.unpack(theta)
        # Sums over the vocabulary in fp32 would leave an error of a hundredth in the weights' gradient.
        log_q = means(log_p.double(), parts.weights, float(POOLS.index(self.pool)), self.model.combiner.support)
        scores = self._met(log_q, parts.trust, log_p, logits)
        return nn.functional.cross_entropy(scores / parts.temperature, targets, reduction="none")

    def _met(
        self, log_q: Float[Tensor, "B v"], trust: Tensor, log_p: Float[Tensor, "n B v"], logits: Tensor | None
    ) -> Float[Tensor, "B v"]:
        """Return the log-probabilities of ``meet`` from the pool ``log_q``."""
        who = range(len(log_p)) if self.trusted is None else self.trusted
        rows = list(who)
        heads = tuple(self.model.combiner.given[i] for i in rows)
        log_p = log_normalize(log_p[rows].double())
        problem = Problem(
            log_p=log_p,
            heads=heads,
            slopes=slopes_of(heads, None if logits is None else logits[rows], log_p, log_p.shape),
            settings=Settings(trust=1.0, pool="prob-mean", tol=self.tol, max_steps=_MAX_STEPS).for_members(len(rows)),
            support=self.model.combiner.support,
            dtype=product_dtype(torch.float32, self.tol),
        )
        projection = problem.projection(list(range(len(rows))), problem.trust)
        # Outside the support that all members share the projection is zero, so the pool is restricted to it first.
        shared = (~problem.log_p.isneginf()).all(0)
        log_q = log_normalize(torch.where(shared & ~log_q.isneginf(), log_q, -torch.inf))
        return projected(replace(projection, log_q=log_q, tol=self.tol), trust, _solve)

    @torch.no_grad()
    def _log_probs(self, k: int, chunk: Positions) -> tuple[Tensor, Tensor | None]:
        """Return (log-probabilities, logits or None) of the members at chunk ``k``, kept or computed."""
        found = self._held.get(k) or self.model.combiner.own_log_probs(chunk.hidden)
        if self.keep:
            self._held[k] = found
        return found


def _loss_in_pieces(
    engine: Engine, whole: Objective, on_progress: Callable[[int], None] = lambda positions: None
) -> LossAndGradient:
    """Return a function from θ to the mean of an objective over its positions, in nats, with its gradient.

    The mean is computed in pieces, and their results are added in order, so that it does not depend on where they ran.

    Args:
        engine: runs the pieces.
        whole: the objective at all positions; its ``keep`` is replaced by whether the machine's memory suffices.
        on_progress: called with the number of positions of each finished piece.
    """
    v, positions = whole.model.config.vocab_size, whole.positions
    keep = 4 * len(whole.model.heads) * v * len(positions) <= HELD * psutil.virtual_memory().total
    # Pieces of wide heads are smaller, so that a minibatch goes to every worker.
    parts = list(positions.chunks(min(PIECE, 2 * chunk_size(v))))
    pieces = engine.keep([replace(whole, positions=part, keep=keep) for part in parts])

    def loss(theta: Float[Tensor, " k"]) -> tuple[float, Float[Tensor, " k"]]:
        found = {}
        for k, sums in engine.map(Objective.sums, [(piece, theta) for piece in pieces]):
            found[k] = sums
            on_progress(len(parts[k]))
        totals, gradients = zip(*(found[k] for k in range(len(found))), strict=True)
        return sum(totals) / len(positions), sum(gradients, torch.zeros_like(theta)) / len(positions)

    return loss


def minimise(
    whole: Objective,
    start: Values,
    evaluations: int,
    engine: Engine,
    *,
    batch: int | None = None,
    cache: PieceCache | None = None,
    name: str = "loss",
    on_progress: Callable[[int], None] = lambda positions: None,
) -> tuple[Values, float, int]:
    """Minimise an objective, by L-BFGS on all positions at once, or by Adam on minibatches.

    Args:
        whole: the objective at all positions.
        start: the values to begin at, as many as ``whole.layout`` says.
        evaluations: for L-BFGS, the most evaluations of the loss with its gradient; for Adam, the number of steps.
        engine: runs the evaluations, in pieces.
        batch: positions in each of Adam's minibatches, taken in turn from one fixed random order; None for L-BFGS.
        cache: keeps each evaluation by ``name`` and number, and supplies those of an earlier run, which must have had
            the same arguments.
        name: the name of these evaluations in the cache.
        on_progress: called in this process with the number of positions of each finished piece of every evaluation that
            the cache does not supply.

    Returns:
        (the values: the best ones for L-BFGS, the last ones for Adam; the loss in nats per position: the best one for
        L-BFGS, the mean over the later half of the steps for Adam; the number of evaluations).
    """
    numbers, stored = itertools.count(1), cache or PieceCache()

    def evaluated(loss: LossAndGradient, theta: Tensor) -> tuple[float, Tensor]:
        return stored.evaluation(f"{name}-{next(numbers):04d}", lambda: loss(theta))

    if batch is None:
        loss = _loss_in_pieces(engine, whole, on_progress)
        return _lbfgs(partial(evaluated, loss), whole.layout, start, evaluations)
    order = torch.randperm(len(whole.positions), generator=torch.Generator().manual_seed(0))

    def minibatch(k: int, theta: Tensor) -> tuple[float, Tensor]:
        rows = order[torch.arange(k * batch, (k + 1) * batch) % len(order)]
        part = replace(whole, positions=whole.positions.take(rows))
        return evaluated(lambda at: _loss_in_pieces(engine, part, on_progress)(at), theta)

    return _adam(minibatch, whole.layout, start, evaluations)


def _lbfgs(loss: LossAndGradient, layout: Layout, start: Values, evaluations: int) -> tuple[Values, float, int]:
    """Minimise by L-BFGS within the bounds; return (the best values, their loss, the number of evaluations)."""
    from scipy.optimize import minimize

    best: list[Any] = [math.inf, layout.pack(start)]

    def value(theta: Any) -> tuple[float, Any]:
        at = torch.tensor(theta, dtype=torch.float64)
        found, gradient = loss(at)
        if found < best[0]:
            best[:] = [found, at]
        return _UNIT * found, _UNIT * gradient.numpy()

    done = minimize(
        value, layout.pack(start).numpy(), jac=True, method="L-BFGS-B", bounds=layout.bounds(),
        options={"maxfun": evaluations, "ftol": 1e-6, "gtol": 1e-4},
    )  # fmt: skip
    return layout.values(best[1]), best[0], int(done.nfev)


def _adam(
    loss: Callable[[int, Tensor], tuple[float, Tensor]], layout: Layout, start: Values, steps: int
) -> tuple[Values, float, int]:
    """Minimise by Adam, ``loss`` of (step, θ); return (the last values, the mean loss of the later half, the steps)."""
    theta = torch.nn.Parameter(layout.pack(start))
    adam = torch.optim.Adam([theta], lr=_RATE, betas=(0.8, 0.95))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    seen = []
    for k in range(steps):
        found, theta.grad = loss(k, theta.detach())
        seen.append(found)
        adam.step()
        rate.step()
        theta.data = layout.clip(theta.data)
    late = seen[steps // 2 :]
    return layout.values(theta), sum(late) / len(late), steps
