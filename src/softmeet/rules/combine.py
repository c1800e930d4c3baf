"""``softmeet.combine``: combine the distributions of several members into one by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor

from softmeet.errors import InfeasibleError, InvalidInputError, NotConvergedError
from softmeet.heads import SoftmaxHead
from softmeet.rules import validate
from softmeet.rules.answer import Answer
from softmeet.rules.answered import answered
from softmeet.rules.base import Rule
from softmeet.rules.gates import gated
from softmeet.rules.problem import Problem
from softmeet.rules.settings import Settings, rule_of
from softmeet.rules.signatures import takes_settings
from softmeet.rules.solution import Solution, from_answer
from softmeet.solvers.base import Status, unfinished

# Below this, rounding of fp32 products would hide the gap.
_FINEST_FP32 = 1e-6


@takes_settings
def combine(
    log_probs: Float[Tensor, "n *batch v"] | ArrayLike,
    heads: Sequence[SoftmaxHead | Tensor | ArrayLike],
    rule: str | Rule = "meet",
    *,
    throw: bool = False,
    logits: Float[Tensor, "n *batch v"] | ArrayLike | None = None,
    support: Bool[Tensor, " v"] | ArrayLike | None = None,
    start: Solution | None = None,
    **settings: Any,
) -> Solution:
    """Combine n members' next-token distributions into one.

    The function has no side effects, and a row's answer depends on that row alone, up to rounding. Vectors over the
    vocabulary are fp64 inside; products with heads run in fp64 if ``log_probs`` is fp64, ``tol`` is below 1e-6 or the
    answer must have the members' moments, and in fp32 otherwise, whatever the heads' dtype. Arrays may be given as
    tensors, as NumPy arrays, or as lists of numbers (which count as fp64) or of the members' arrays; what comes back is
    made of tensors.

    Args:
        log_probs: the members' log-probabilities in nats, at temperature 1, (n, *batch, v); -inf for probability 0.
        heads: each member's head, in the order of ``log_probs``: its weight W_i, (v, d_i), floating, or a
            :class:`SoftmaxHead`, which can have a bias, a scale and a soft-cap too.
        rule: a name, with options as in ``"meet:trust=1/0.3"``, or an instance of :class:`softmeet.Rule`.
        throw: raise a NotConvergedError if a row ends with the status NOT_CONVERGED or BUDGET; else such rows get the
            best distribution found, which may be the pool, and is never worse than that by what the rule measures.
        logits: the members' logits, after soft-caps, (n, *batch, v); needed if a head has a soft-cap.
        support: a bool mask, (v,), of the tokens that may have positive probability, such as the ids that the tokenizer
            knows if heads are padded; None for all.
        start: what an earlier call of ``combine`` returned for the same rows and heads with the rule ``meet`` or
            ``max-entropy``, perhaps at other trusts; solvers begin at its dual variables. None to begin at the pool.
            The answer is the same within ``tol``.
        settings: the fields of :class:`softmeet.Settings`, and options of the rule.
            ``on_infeasible`` also takes what an earlier call of ``combine`` returned for the same rows, heads and
            settings with the rule ``meet``, infinite trusts replaced by 0.3, no gate, and a ``tol`` that is not larger;
            it then answers the rows without a feasible distribution at no cost.

    Returns:
        The distributions, (*batch, v), with each row's status, gap and costs.

    Raises:
        InvalidInputError: if a shape, sign, length or name is wrong, the probabilities of a row do not sum to 1 within
            5 %, ``logits`` are needed and missing, the solution given as ``start`` or ``on_infeasible``
            does not fit.
        NonFiniteError: if a log-probability is NaN or +inf, a row of a member is all -inf, or a logit is NaN, or beyond
            its soft-cap and not -inf.
        DisjointSupportError: if in some row no token of ``support`` has positive probability under every member; for
            ``logit-mean`` and ``one-hot``, every member of nonzero weight; for ``prob-mean`` and ``power-mean`` (at an
            order above 0), any such member.
        RuleError: if the rule fails, or returns something other than distributions.
        InfeasibleError: if ``on_infeasible`` is ``"raise"`` and a row has no feasible distribution.
        NotConvergedError: if ``throw`` is set and a row ends with the status NOT_CONVERGED or BUDGET.

    Example:
        >>> import torch
        >>> import softmeet
        >>> heads = [torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]]
        >>> members = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
        >>> solution = softmeet.combine(members, heads, "meet", trust=1.0)
        >>> solution.log_probs.exp(), softmeet.Status(int(solution.status)).name
        (tensor([0.4024, 0.4024, 0.1952]), 'OPTIMAL')
        >>> softmeet.combine(members.numpy(), [head.tolist() for head in heads], trust=1.0).log_probs.exp()
        tensor([0.4024, 0.4024, 0.1952])
    """
    log_probs = validate.as_tensor(log_probs, "log_probs")
    relaxed = settings.get("on_infeasible")
    if isinstance(relaxed, Solution):
        settings["on_infeasible"] = None
    chosen = Settings.of({"rule": rule, **settings})
    if start is not None and not isinstance(start, Solution):
        raise InvalidInputError(f"expected what combine returned as start=, got {type(start).__name__}")
    log_p = validate.checked_log_probs(log_probs)
    found = validate.checked_heads(heads, log_p)
    problem = Problem(
        log_p=log_p,
        heads=found,
        slopes=validate.slopes_of(found, logits, log_p, log_probs.shape),
        settings=chosen.for_members(len(log_p)),
        support=validate.checked_support(support, log_p),
        dtype=product_dtype(log_probs.dtype, chosen.tol),
        start=None if start is None else start.as_start(found, log_p),
        precision=torch.finfo(log_probs.dtype).eps,
    )
    known = relaxed.as_fallback(problem) if isinstance(relaxed, Solution) else None
    return solve(problem, log_probs.shape[1:-1], log_probs.dtype, known, throw=throw)


def product_dtype(given: torch.dtype, tol: float) -> torch.dtype:
    """Return the dtype in which heads are multiplied: fp64 if ``given`` is fp64 or ``tol`` is below 1e-6, else fp32.

    Args:
        given: the dtype of the members' log-probabilities.
        tol: the tolerance for the gap, in nats.
    """
    return torch.float64 if tol < _FINEST_FP32 else torch.promote_types(given, torch.float32)


def solve(
    problem: Problem, shape: torch.Size, dtype: torch.dtype, relaxed: Answer | None = None, *, throw: bool = False
) -> Solution:
    """Solve a checked problem: by its gate, its rule, its fallback and its temperature, in this order.

    The rule solves the rows at which the gate is open; ``on_infeasible`` answers those that have no feasible
    distribution; then the rule's temperature is applied, except to rows in which a gate lets the first member answer
    alone.

    Args:
        problem: the problem, of B rows, whose tensors and settings were checked as :func:`combine` checks them.
        shape: the batch dimensions, of B elements in all, that the solution gets.
        dtype: the dtype of the log-probabilities as the caller gave them; the solution's is the same, but at least
            fp32.
        relaxed: an answer to all B rows, as :meth:`Solution.as_fallback` makes it, to be used in rows without a
            feasible distribution; None to solve such rows by the rule that ``on_infeasible`` names.
        throw: raise a NotConvergedError if a row ends with the status NOT_CONVERGED or BUDGET.

    Raises:
        RuleError, InfeasibleError, NotConvergedError, DisjointSupportError: as in :func:`combine`.
        InvalidInputError: if the gate needs a factor or a text that is unknown.
    """
    answer, closed, seconds = gated(problem)
    answer, fallback = _answer_infeasible_rows(problem, answer, relaxed)
    if throw and (late := unfinished(answer.status)).any():
        rows, allowed = late.nonzero().flatten().tolist(), problem.settings.max_steps
        most = int(answer.steps[late].max())
        cut = bool((answer.status == Status.BUDGET).any())
        raise NotConvergedError(
            f"{len(rows)} of {len(late)} rows did not reach tol={problem.tol:g} nats (first: {rows[:8]}, "
            f"largest gap {answer.gap[late].max():.3g}): raise tol, or {'the time or budget, or ' if cut else ''}"
            f"max_steps, of which up to {min(most, allowed)} of {allowed} were taken"
        )
    given = torch.promote_types(dtype, torch.float32)
    solution = from_answer(problem, answer, (fallback, closed), seconds, shape, given)
    return solution if problem.settings.rule_temperature == 1 else _tempered(solution)


def _tempered(solution: Solution) -> Solution:
    """Return the solution at the rule's temperature, except for rows that the first member answers alone."""
    settings = solution.problem.settings
    found = solution.at_temperature(settings.rule_temperature)
    if settings.gate is None or not settings.gate.first_alone:
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
    instead.status = torch.where(unfinished(instead.status), instead.status, int(Status.INFEASIBLE))
    return answer.put(rows, instead), infeasible
