"""Call a rule, and refuse an answer that is not a distribution: users may write rules of their own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from softmeet.errors import RuleError, SoftmeetError
from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.base import Rule
from softmeet.rules.problem import Problem
from softmeet.solvers.base import ended
from softmeet.solvers.clock import failed_to_say

# By how much the sum of a row's probabilities may differ from 1: the rounding of half-precision log-probabilities.
_MASS_TOLERANCE = 1e-3


def answered(rule: Rule, problem: Problem) -> Answer:
    """Solve every row of a problem by a rule, and check that each answer is a distribution.

    If the time is over then (:func:`softmeet.time_is_over`), rows that are NOT_CONVERGED get the status BUDGET.

    Returns:
        The rule's own answer; or, from a rule that returns log-probabilities alone, an answer with these, restricted to
        ``problem.support``, of gap 0 and not certified.

    Raises:
        SoftmeetError: any error of softmeet that the rule raises, unchanged; so is what the function raises that
            :func:`softmeet.time_limit` was given.
        RuleError: if the rule raises another exception, or returns neither an ``Answer`` nor a floating tensor, another
            shape than (B, v), NaN, or a row whose probabilities do not sum to 1 within 10⁻³ (in an ``Answer``, the sum
            over ``problem.support`` counts); the message names the rule.
        DisjointSupportError: if the rule returns log-probabilities alone, and a row has no mass on the support.
    """
    answer = _one(rule, problem)
    answer.status = ended(answer.status)
    return answer


def _one(rule: Rule, problem: Problem) -> Answer:
    try:
        found = rule.solve(problem)
    except SoftmeetError:
        raise
    except Exception as error:
        if failed_to_say(error):
            raise
        raise RuleError(f"the rule {rule} failed: {type(error).__name__}: {error}") from error
    log_probs = found if isinstance(found, Tensor) else getattr(found, "log_probs", None)
    expected = problem.log_p.shape[1:]
    if not isinstance(log_probs, Tensor) or log_probs.shape != expected or not log_probs.is_floating_point():
        what = f"{log_probs.dtype} of shape {tuple(log_probs.shape)}" if isinstance(log_probs, Tensor) else repr(found)
        raise RuleError(
            f"the rule {rule} gave {what}: expected floating log-probabilities of shape {tuple(expected)}, or an Answer"
        )
    # A formula may give mass to ids outside the support, which is removed below; a solver may not.
    support = None if isinstance(found, Tensor) else problem.support
    mass = (log_probs if support is None else log_probs[:, support]).exp().sum(-1)
    good = (mass - 1).abs() <= _MASS_TOLERANCE
    if not bool(good.all()):
        row = int((~good).nonzero()[0, 0])
        raise RuleError(
            f"the rule {rule} gave no distribution in row {row}: its probabilities sum to {float(mass[row]):.6g}"
            + ("" if support is None else " over the ids that are tokens")
        )
    if not isinstance(found, Tensor):
        return found
    # Nothing proves that a formula is optimal.
    answer = closed_form(problem, problem.restricted(log_probs.double()))
    return replace(answer, certified=torch.zeros_like(answer.certified))
