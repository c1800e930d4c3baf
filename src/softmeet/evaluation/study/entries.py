"""The rules that a study compares, and how one is run on rows whose true distribution is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet import combine
from softmeet.evaluation.choices import RuleChoice
from softmeet.heads import SoftmaxHead
from softmeet.rules.registry import rule_names
from softmeet.simplex import kl
from softmeet.solvers.base import Status

_MAX_STEPS = 100


def _entry(name: str, **options: Any) -> RuleChoice:
    """Make a line of a study's tables; the first word of its name is the rule."""
    return RuleChoice(name, {"rule": name.split()[0], **options})


BASELINES = tuple(map(_entry, ("logit-mean", "prob-mean", "one-hot")))
TRUSTS = (0.1, 0.3, 1.0, 2.0, 4.0, 10.0)
MEETS = tuple(_entry(f"meet {rho:g}", trust=rho) for rho in TRUSTS)
EXACT = (
    _entry("max-entropy"),
    _entry("least-squares"),
    _entry("least-squares raw", metric="raw"),
    _entry("min-cross-entropy"),
    _entry("min-cross-entropy vertex", vertex=True),
    _entry("min-squared-cross-entropy"),
    _entry("min-underestimation"),
    _entry("min-reverse-cross-entropy"),
)
_NAMED = {entry.settings["rule"] for entry in (*BASELINES, *MEETS, *EXACT)}
# Rules of installed packages, under their default options.
OTHERS = tuple(_entry(name) for name in rule_names() if name not in _NAMED)
ALL = (*BASELINES, *MEETS, *EXACT, *OTHERS)


def score_all(
    heads: Sequence[SoftmaxHead], log_p: Float[Tensor, "n B v"], log_truth: Float[Tensor, "B v"], tol: float
) -> dict[str, Any]:
    """Compare every member and every rule with a known truth.

    Args:
        heads: the members'.
        log_p: their log-probabilities in nats, fp64.
        log_truth: the true ones.
        tol: of the solvers, in nats.

    Returns:
        ``members``, KL(truth‖p̂_i) of each member and row, and ``rules``, what became of each by name: ``kl``, the same
        of every row; how many rows are ``infeasible`` (proved to be, whoever answers them), ``degenerate`` or
        ``unsolved``; and the objective's ``range`` over the feasible set where it is known.
    """
    members = [finite_or_none(kl(log_truth, own.double())) for own in log_p]
    rules = {}
    for entry in ALL:
        found = combine(log_p, heads, **entry.settings, tol=tol, max_steps=_MAX_STEPS)
        proved = torch.stack([lam.ne(0).any(-1) for lam in found.proof]).any(0)
        least, most = found.objective_range
        rules[entry.name] = {
            "kl": finite_or_none(kl(log_truth, found.log_probs.double())),
            "infeasible": int((found.fallback | proved).sum()),
            "degenerate": int((found.status == Status.DEGENERATE).sum()),
            "unsolved": int((found.status == Status.NOT_CONVERGED).sum()),
            "range": finite_or_none((most - least)[~found.fallback & ~least.isnan()]),
        }
    return {"members": members, "rules": rules}


def finite_or_none(values: Float[Tensor, " B"]) -> list[float | None]:
    """Return numbers as JSON has them, None for infinity and NaN.

    >>> finite_or_none(torch.tensor([0.5, float("inf")]))
    [0.5, None]
    """
    return [x if math.isfinite(x) else None for x in values.tolist()]
