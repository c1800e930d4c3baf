"""``softmeet.combine``: from the members' distributions to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.errors import InfeasibleError, InvalidInputError, NotConvergedError
from softmeet.heads import SoftmaxHead
from softmeet.rules import validate
from softmeet.rules.answer import Answer
from softmeet.rules.answered import answered
from softmeet.rules.base import Rule
from softmeet.rules.gates import Unsure, gated
from softmeet.rules.problem import Problem
from softmeet.rules.settings import Settings, rule_of
from softmeet.rules.signatures import takes_settings
from softmeet.rules.solution import Solution, from_answer
from softmeet.solvers.base import Status

# Below this, rounding of fp32 products would hide the gap.
_FINEST_FP32 = 1e-6


@takes_settings
def combine(
    log_probs: Float[Tensor, "n *batch v"],
    heads: Sequence[SoftmaxHead | Tensor],
    rule: str | Rule = "meet",
    *,
    throw: bool = False,
    logits: Float[Tensor, "n *batch v"] | None = None,
    support: Bool[Tensor, " v"] | None = None,
    hidden: Sequence[Tensor] | None = None,
    start: Solution | None = None,
    **settings: Any,
) -> Solution:
    """Combine n members' next-token distributions into one.

    Pure and batched: a row's answer depends on that row alone. Vectors over the vocabulary are fp64 inside; products
    with heads run in fp64 if ``log_probs`` is fp64 or ``tol`` is below 1e-6 and in fp32 otherwise, whatever the heads'
    dtype.

    Args:
        log_probs: the members' untempered log-probabilities in nats, (n, *batch, v); -inf for an impossible token.
        heads: one per member: W_i as a tensor (v, d_i), or a :class:`SoftmaxHead` where there is a soft-cap.
        rule: a name, with options as in ``"meet:trust=1/0.3"``, or an instance of :class:`softmeet.Rule`.
        throw: raise on NOT_CONVERGED.
        logits: the members' logits, (n, *batch, v); needed where a head has a soft-cap.
        support: (v,) bool, the tokens that may be answered (the tokenizer's, where heads are padded); None for all.
        hidden: the members' last hidden states, n tensors (*batch, d_i), for ``free_radial``; recovered from the
            log-probabilities if None.
        start: a solution by ``meet`` or ``max-entropy`` of the same rows, perhaps at other trusts, near which ``meet``
            looks for its answer, and every other rule for a feasible distribution or a proof that there is none; at the
            pool if None. The answer is the same within ``tol``.
        settings: the fields of :class:`softmeet.Settings`, listed below, and options of the rule itself. With
            ``on_infeasible`` a solution by ``meet`` of the same rows may be given: it spares solving it again.

    Raises:
        InvalidInputError: a shape, sign, length or name is wrong (its subclasses: NaN or +inf, disjoint supports).
        RuleError: the rule failed, or what it gave is no distribution.
        InfeasibleError: with ``on_infeasible="raise"``.
        NotConvergedError: with ``throw=True``.

    Example:
        >>> import torch
        >>> import softmeet
        >>> heads = [torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]]
        >>> members = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
        >>> solution = softmeet.combine(members, heads, "meet", trust=1.0)
        >>> solution.log_probs.exp(), softmeet.Status(int(solution.status)).name
        (tensor([0.4024, 0.4024, 0.1952]), 'OPTIMAL')
    """
    relaxed = settings.get("on_infeasible")
    if isinstance(relaxed, Solution):
        settings["on_infeasible"] = None
    chosen = Settings.of({"rule": rule, **settings})
    if chosen.bands > 1:
        raise InvalidInputError("bands are cut from heads by an ensemble: pass each band as a head, or leave bands out")
    log_p = validate.checked_log_probs(log_probs)
    found = validate.checked_heads(heads, log_p)
    problem = Problem(
        log_p=log_p,
        heads=found,
        slopes=validate.slopes_of(found, logits, log_p, log_probs.shape),
        settings=chosen.for_members(len(log_p)),
        support=validate.checked_support(support, log_p),
        dtype=product_dtype(log_probs.dtype, chosen.tol),
        free=validate.free_directions(found, log_p, logits, hidden, log_probs.shape) if chosen.free_radial else (),
        start=None if start is None else start.as_start(found, log_p),
        precision=torch.finfo(log_probs.dtype).eps,
    )
    known = relaxed.as_fallback(problem) if isinstance(relaxed, Solution) else None
    return solve(problem, log_probs.shape[1:-1], log_probs.dtype, known, throw=throw)


def product_dtype(given: torch.dtype, tol: float) -> torch.dtype:
    """Choose the dtype of products with heads, from that of the log-probabilities and the tolerance."""
    return torch.float64 if tol < _FINEST_FP32 else torch.promote_types(given, torch.float32)


def solve(
    problem: Problem, shape: torch.Size, dtype: torch.dtype, relaxed: Answer | None = None, *, throw: bool = False
) -> Solution:
    """Answer a problem by its rule, where its gate is open, and what the rule leaves open by the fallback.

    Args:
        problem: checked already.
        shape: of the batch.
        dtype: of the log-probabilities as they were given; fp32 is the least that comes back.
        relaxed: what answers rows without a feasible distribution, where it is known.
        throw: raise on NOT_CONVERGED.

    Raises:
        RuleError, InfeasibleError, NotConvergedError: as :func:`combine`.
    """
    answer, closed, seconds = gated(problem)
    answer, fallback = _answer_infeasible_rows(problem, answer, relaxed)
    if throw and (late := (answer.status == Status.NOT_CONVERGED)).any():
        rows = late.nonzero().flatten().tolist()
        raise NotConvergedError(
            f"{len(rows)} of {len(late)} rows did not reach tol={problem.tol:g} nats (first: {rows[:8]}, "
            f"largest gap {answer.gap[late].max():.3g}): raise tol, or "
            f"max_steps, of which up to {answer.steps[late].max()} of {problem.settings.max_steps} were taken"
        )
    given = torch.promote_types(dtype, torch.float32)
    solution = from_answer(problem, answer, (fallback, closed), seconds, shape, given)
    return solution if problem.settings.rule_temperature == 1 else _tempered(solution)


def _tempered(solution: Solution) -> Solution:
    """Apply the rule's temperature, but for rows at which the first member answers alone."""
    settings = solution.problem.settings
    found = solution.at_temperature(settings.rule_temperature)
    if not isinstance(settings.gate, Unsure):
        return found
    return replace(found, log_probs=torch.where(solution.gated[..., None], solution.log_probs, found.log_probs))


def _answer_infeasible_rows(
    problem: Problem, answer: Answer, relaxed: Answer | None
) -> tuple[Answer, Bool[Tensor, " B"]]:
    infeasible = answer.status == Status.INFEASIBLE
    if not infeasible.any():
        return answer, infeasible
    rows = infeasible.nonzero().flatten()
    if problem.settings.on_infeasible == "raise":
        raise InfeasibleError(
            f"no distribution has every member's moments in {len(rows)} of {len(infeasible)} rows (first: "
            f"{rows[:8].tolist()}): use rule='meet' with finite trust, or on_infeasible='meet'"
        )
    fallback = rule_of(problem.settings.on_infeasible)
    instead = answered(fallback, problem.take(rows).relaxed()) if relaxed is None else relaxed.take(rows)
    instead.steps = instead.steps + answer.steps[rows]
    instead.passes = instead.passes + answer.passes[rows]
    instead.ray = tuple(ray[rows] for ray in answer.ray)
    failed = instead.status == Status.NOT_CONVERGED
    instead.status = torch.where(failed, instead.status, int(Status.INFEASIBLE))
    return answer.put(rows, instead), infeasible
