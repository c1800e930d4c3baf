"""The rules that a study compares, and how one is run on rows whose true distribution is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet import combine
from softmeet.heads import SoftmaxHead
from softmeet.rules.registry import rule_names
from softmeet.simplex import kl
from softmeet.solvers.base import Status


@dataclass(frozen=True)
class Entry:
    """One line of a study's tables: a rule of ``combine`` with some options."""

    label: str
    rule: str
    options: dict[str, Any] = field(default_factory=dict)


BASELINES = (Entry("logit-mean", "logit-mean"), Entry("prob-mean", "prob-mean"), Entry("one-hot", "one-hot"))
TRUSTS = (0.1, 0.3, 1.0, 2.0, 4.0, 10.0)
MEETS = tuple(Entry(f"meet {rho:g}", "meet", {"trust": rho}) for rho in TRUSTS)
EXACT = (
    Entry("max-entropy", "max-entropy"),
    Entry("least-squares", "least-squares"),
    Entry("least-squares raw", "least-squares", {"metric": "raw"}),
    Entry("min-cross-entropy", "min-cross-entropy"),
    Entry("min-cross-entropy vertex", "min-cross-entropy", {"vertex": True}),
    Entry("min-squared-cross-entropy", "min-squared-cross-entropy"),
    Entry("min-underestimation", "min-underestimation"),
    Entry("min-reverse-cross-entropy", "min-reverse-cross-entropy"),
)
_NAMED = {entry.rule for entry in (*BASELINES, *MEETS, *EXACT)}
# Rules of installed packages, under their default options.
OTHERS = tuple(Entry(name, name) for name in rule_names() if name not in _NAMED)
ALL = (*BASELINES, *MEETS, *EXACT, *OTHERS)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one set of members with a known truth: log-probabilities in nats, fp64."""

    heads: Sequence[SoftmaxHead]
    log_p: Float[Tensor, "n B v"]
    log_truth: Float[Tensor, "B v"]


def score(rows: Rows, entry: Entry, tol: float, max_steps: int = 100) -> dict[str, Any]:
    """KL(truth‖answer) of every row, null for infinity, and how the rows ended.

    Rows that are proved to have no feasible distribution are counted in ``infeasible``, whoever answers them.
    """
    found = combine(rows.log_p, rows.heads, entry.rule, tol=tol, max_steps=max_steps, **entry.options)
    out: dict[str, Any] = {"kl": finite(kl(rows.log_truth, found.log_probs.double()))}
    proved = torch.stack([lam.ne(0).any(-1) for lam in found.proof]).any(0)
    out["infeasible"] = int((found.fallback | proved).sum())
    out["degenerate"] = int((found.status == Status.DEGENERATE).sum())
    out["unsolved"] = int((found.status == Status.NOT_CONVERGED).sum())
    least, most = found.objective_range
    out["range"] = finite((most - least)[~found.fallback & ~least.isnan()])
    return out


def score_all(rows: Rows, tol: float) -> dict[str, Any]:
    """KL(truth‖p̂_i) of every member and row, and what :func:`score` says of every rule."""
    members = [finite(kl(rows.log_truth, own.double())) for own in rows.log_p]
    return {"members": members, "rules": {entry.label: score(rows, entry, tol) for entry in ALL}}


def finite(values: Float[Tensor, " B"]) -> list[float | None]:
    """As JSON has it: null for infinity and NaN."""
    return [x if math.isfinite(x) else None for x in values.tolist()]


def generator(*seed: int) -> torch.Generator:
    """One that depends on all of ``seed``."""
    state = 0
    for part in seed:
        state = (state * 1_000_003 + part + 1) % (1 << 62)
    return torch.Generator().manual_seed(state)
