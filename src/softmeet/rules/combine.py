"""``softmeet.combine``: from the members' distributions to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.errors import InfeasibleError, NotConvergedError
from softmeet.heads import SoftmaxHead
from softmeet.rules import validate
from softmeet.rules.base import Answer
from softmeet.rules.gates import Gate, find_gate, gated
from softmeet.rules.meet import Meet
from softmeet.rules.problem import OnInfeasible, Problem
from softmeet.rules.registry import find_rule
from softmeet.rules.solution import Solution, from_answer
from softmeet.solvers.base import Status

# Below this, rounding of fp32 products would hide the gap.
_FINEST_FP32 = 1e-6


def combine(
    log_probs: Float[Tensor, "n *batch v"],
    heads: Sequence[SoftmaxHead | Tensor],
    rule: str = "meet",
    *,
    weights: Sequence[float] | Tensor | None = None,
    trust: float | Sequence[float] | Tensor | None = None,
    pool: str = "logit-mean",
    tol: float = 1e-4,
    max_steps: int = 50,
    on_infeasible: OnInfeasible | Solution = "meet",
    throw: bool = False,
    free_weights: bool = False,
    logits: Float[Tensor, "n *batch v"] | None = None,
    support: Bool[Tensor, " v"] | None = None,
    rank: SupportsIndex | None = None,
    free_radial: bool = False,
    hidden: Sequence[Tensor] | None = None,
    metric: str = "whitened",
    slack: float = 0.0,
    vertex: bool = False,
    gate: str | Gate | None = None,
    start: Solution | None = None,
) -> Solution:
    """One next-token distribution from n members'.

    Pure and batched: a row's answer depends on that row alone. Vectors over the vocabulary are fp64 inside; products
    with heads run in fp64 if ``log_probs`` is fp64 or ``tol`` is below 1e-6 and in fp32 otherwise, whatever the heads'
    dtype.

    Args:
        log_probs: the members' untempered log-probabilities in nats, (n, *batch, v); -inf for an impossible token.
        heads: one per member: W_i as a tensor (v, d_i), or a :class:`SoftmaxHead` where there is a soft-cap.
        rule: a name from ``softmeet.RULES``.
        weights: of the pool, n numbers that are not negative and sum to 1 (any sum with ``free_weights``); uniform
            if None.
        trust: ρ, one number or n, from 0 (the pool) to inf (the exact constraint); 0.3 if None.
        pool: ``"logit-mean"`` or ``"prob-mean"``: what ``meet`` and ``max-entropy`` start from, and what other rules
            stay near where their criterion leaves a choice.
        tol: the duality gap in nats at which a row is done.
        max_steps: of the solver; a row that needs more is NOT_CONVERGED and gives the best point it found.
        on_infeasible: ``"meet"`` answers rows that have no feasible distribution by ``meet`` with the default trust
            wherever the trust is infinite; its solution, where it is at hand, spares solving it again; ``"raise"``
            raises. ``least-squares`` answers such rows itself.
        throw: raise on NOT_CONVERGED.
        logits: the members' logits, (n, *batch, v); needed where a head has a soft-cap.
        support: (v,) bool, the tokens that may be answered (the tokenizer's, where heads are padded); None for all.
        rank: keep this many of each head's largest singular directions, as basis-aware truncation does; None for all.
            A relaxation: fewer moments are constrained.
        free_radial: leave free the directions of the moments that the gradient before the final norm cannot see: x̂/γ
            and, for a LayerNorm, 1/γ (``SoftmaxHead.norm``; a head without one is taken to follow an RMS norm
            without gains).
        hidden: the members' last hidden states, n tensors (*batch, d_i), for ``free_radial``; recovered from the
            log-probabilities if None.
        metric: of ``least-squares``: ``"whitened"``, or ``"raw"`` for ‖Wᵀ(p - p̂)‖.
        slack: of ``min-cross-entropy`` and ``min-squared-cross-entropy``: τ ≥ 0, by which moments may differ from the
            members' at a cost of ‖Qᵀ(p - p̂)‖² / 2τ; 0 for exact moments.
        vertex: of the same two: where they choose nothing, answer with some vertex of the feasible set in place of the
            I-projection of the pool (without bias, from the logit mean, its member of maximum entropy).
        gate: ``"unsure:T"`` or ``"disagreement:T"``: where the rule is not solved (``softmeet.rules.gates``);
            ``Solution.gated`` says which rows those are. None for none.
        start: a solution by ``meet`` or ``max-entropy`` of the same rows, perhaps at other trusts, near which ``meet``
            looks for its answer, and every other rule for a feasible distribution or a proof that there is none; at the
            pool if None. The answer is the same within ``tol``.

    Raises:
        InvalidInputError: a shape, sign, length or name is wrong (its subclasses: NaN or +inf, disjoint supports).
        InfeasibleError: with ``on_infeasible="raise"``.
        NotConvergedError: with ``throw=True``.
    """
    chosen = find_rule(rule)
    log_p = validate.checked_log_probs(log_probs)
    n, given = len(log_p), torch.promote_types(log_probs.dtype, torch.float32)
    if not isinstance(on_infeasible, Solution):
        validate.checked_on_infeasible(on_infeasible)
    found = validate.checked_heads(heads, log_p)
    problem = Problem(
        log_p=log_p,
        heads=found,
        slopes=validate.slopes_of(found, logits, log_p, log_probs.shape),
        weights=log_p.new_tensor(validate.checked_weights(weights, n, free=free_weights)),
        trust=validate.checked_trust(trust, n),
        pool=validate.checked_pool(pool),
        support=validate.checked_support(support, log_p),
        tol=validate.checked_number("tol", tol, positive=True),
        max_steps=validate.checked_count("max_steps", max_steps),
        dtype=torch.float64 if tol < _FINEST_FP32 else given,
        options=validate.checked_options(rank=rank, free_radial=free_radial, metric=metric, slack=slack, vertex=vertex),
        free=validate.free_directions(found, log_p, logits, hidden, log_probs.shape) if free_radial else (),
        start=None if start is None else start.as_start(found, log_p),
        precision=torch.finfo(log_probs.dtype).eps,
    )
    answer, closed, seconds = gated(chosen, problem, find_gate(gate))
    relaxed = on_infeasible.as_fallback(problem) if isinstance(on_infeasible, Solution) else None
    answer, fallback = _answer_infeasible_rows(problem, answer, relaxed, refuse=on_infeasible == "raise")
    if throw and (late := (answer.status == Status.NOT_CONVERGED)).any():
        rows = late.nonzero().flatten().tolist()
        raise NotConvergedError(
            f"{len(rows)} of {len(late)} rows did not reach tol={tol:g} nats (first: {rows[:8]}, "
            f"largest gap {answer.gap[late].max():.3g}): raise tol, or "
            f"max_steps, of which up to {answer.steps[late].max()} of {max_steps} were taken"
        )
    return from_answer(rule, problem, answer, (fallback, closed), seconds, log_probs.shape[1:-1], given)


def _answer_infeasible_rows(
    problem: Problem, answer: Answer, relaxed: Answer | None, *, refuse: bool
) -> tuple[Answer, Bool[Tensor, " B"]]:
    infeasible = answer.status == Status.INFEASIBLE
    rows = infeasible.nonzero().flatten()
    if not len(rows):
        return answer, infeasible
    if refuse:
        raise InfeasibleError(
            f"no distribution has every member's moments in {len(rows)} of {len(infeasible)} rows (first: "
            f"{rows[:8].tolist()}): use rule='meet' with finite trust, or on_infeasible='meet'"
        )
    instead = Meet().answer(problem.take(rows).relaxed()) if relaxed is None else relaxed.take(rows)
    instead.steps = instead.steps + answer.steps[rows]
    instead.passes = instead.passes + answer.passes[rows]
    instead.ray = tuple(ray[rows] for ray in answer.ray)
    failed = instead.status == Status.NOT_CONVERGED
    instead.status = torch.where(failed, instead.status, int(Status.INFEASIBLE))
    return answer.put(rows, instead), infeasible
