"""Gates: at which positions the rule is worth its cost, decided before any head is read for it.

``unsure:T``         the first member answers alone, unless its largest next-token probability is below T.
``disagreement:T``   the pool answers, unless the members' first-order disagreement exceeds T nats.

Where ``unsure`` is closed nobody else needs to run, which is what saves most; ``disagreement`` needs every member and
saves the solve. ``unsure:T`` with T above 1 and ``disagreement:0`` are no gates, and are treated as none.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.rules.base import Answer, Rule, closed_form
from softmeet.rules.pools import LogitMean
from softmeet.rules.problem import Problem, finite_trust
from softmeet.simplex import kl

NONE = "none"


@dataclass(frozen=True, eq=False)
class Gate(ABC):
    """Where a rule is solved, and what answers where it is not."""

    threshold: float

    name: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.name}:{self.threshold!r}"

    @property
    @abstractmethod
    def never_closes(self) -> bool:
        """Whether the rule is solved everywhere, whatever the members say."""

    @abstractmethod
    def open(self, rule: Rule, problem: Problem) -> Bool[Tensor, " B"]:
        """The rows that the rule is solved at."""

    @abstractmethod
    def instead(self, rule: Rule, problem: Problem) -> Answer:
        """What answers where the rule is not solved, for every row; no head is read."""


@dataclass(frozen=True, eq=False)
class Unsure(Gate):
    """The first member alone, unless the probability of its most probable token is below ``threshold``.

    What it answers there is what the rule makes of one member: its own distribution (or, by ``one-hot``, its most
    probable token). How far that is from what the rule would say is not known: the gap is infinite.

    Args:
        threshold: a probability; above 1 the gate never closes.
        asked: (B,), the rows at which the others were asked, where that was decided when they ran; else it is decided
            from the first member's probabilities.
    """

    asked: Bool[Tensor, " B"] | None = None

    name = "unsure"

    @property
    def never_closes(self) -> bool:
        """Above 1, since no probability is."""
        return self.threshold > 1

    def open(self, rule: Rule, problem: Problem) -> Bool[Tensor, " B"]:
        """By the first member's confidence."""
        return self.among(problem.log_p[0]) if self.asked is None else self.asked

    def among(self, log_p: Float[Tensor, "B v"]) -> Bool[Tensor, " B"]:
        """The rows at which the others have to be asked, from the first member's log-probabilities."""
        return confidence(log_p) < self.threshold

    def instead(self, rule: Rule, problem: Problem) -> Answer:
        """The first member's own answer."""
        alone = replace(
            problem,
            log_p=problem.log_p[:1],
            heads=problem.heads[:1],
            slopes=problem.slopes[:1],
            weights=torch.ones_like(problem.weights[:1]),
            trust=problem.trust[:1],
            free=problem.free[:1],
        )
        own = (LogitMean() if rule.uses_heads else rule).solve(alone)
        answer = closed_form(problem, own.log_probs, own.objective)
        unknown = torch.full_like(answer.gap, torch.inf)
        return replace(answer, gap=unknown, certified=unknown < 0)


@dataclass(frozen=True, eq=False)
class Disagreement(Gate):
    """The pool, unless the members' first-order disagreement exceeds ``threshold`` nats.

    For ``meet`` with finite trusts a closed row is within ``threshold`` of optimal, and says so in its certified gap.
    A rule that reads no head solves nothing that could be left out: its gate is always open.
    """

    name = "disagreement"

    @property
    def never_closes(self) -> bool:
        """At 0 only rows on which all agree are left, which cost nothing anyway."""
        return self.threshold <= 0

    def open(self, rule: Rule, problem: Problem) -> Bool[Tensor, " B"]:
        """By the disagreement of the members about the pool."""
        if not rule.uses_heads:
            return torch.ones_like(problem.log_p[0, :, 0], dtype=torch.bool)
        return first_order_disagreement(problem) > self.threshold

    def instead(self, rule: Rule, problem: Problem) -> Answer:
        """The pool that ``meet`` starts from, with what ``meet`` could still gain over it as its gap."""
        answer = closed_form(problem, problem.log_pool, torch.zeros_like(problem.log_pool[:, 0]))
        bounded = rule.name == "meet" and not any(map(math.isinf, problem.trust))
        gap = first_order_disagreement(problem) if bounded else torch.full_like(answer.gap, torch.inf)
        return replace(answer, gap=gap, certified=gap.isfinite())


def first_order_disagreement(problem: Problem) -> Float[Tensor, " B"]:
    """Σ_i ρ_i KL(q‖p̂_i) in nats, with q the pool and ρ_i the trusts; an infinite trust counts as the default, 0.3.

    It needs the pool and the members' log-probabilities, which every rule has anyway, and no head, and depends on the
    members' distributions alone: W_i → W_i M, constants added to logits and the order of tokens and members are nothing
    to it.

    Why it is weighed by trust and not by weight: the solve that a gate leaves out would improve its objective by V =
    -f* nats, and the pool's and the members' in-family errors together by exactly that (docs/mathematics.md §4). V is
    concave in the trusts, with ∂V/∂ρ_i = KL(r_i‖p̂_i), so that to first order at ρ = 0 it is Σ ρ_i KL(s_i‖p̂_i), s_i the
    member of model i's family with the moments of q. By Pythagoras KL(q‖p̂_i) = KL(q‖s_i) + KL(s_i‖p̂_i), so this sum
    bounds V at every trust: where it is below T the pool is proved to be within T nats of optimal and within √(T/2) in
    total variation, whatever the heads are. A member of trust 0 cannot move the answer, and does not count.
    """
    total = torch.zeros_like(problem.log_pool[:, 0])
    for member, rho in zip(problem.log_p, finite_trust(problem.trust), strict=True):
        if rho:
            total = total + rho * kl(problem.log_pool, member)
    return total


def confidence(log_p: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """The probability of the most probable token."""
    return log_p.amax(-1).exp()


GATES: tuple[type[Gate], ...] = (Unsure, Disagreement)


def find_gate(gate: str | Gate | None) -> Gate | None:
    """The gate that a text such as ``unsure:0.5`` names; None for None, for ``none`` and for one that never closes.

    Raises:
        InvalidInputError: there is no such gate, or its threshold is not a finite number from 0.
    """
    found = parse_gate(gate)
    return None if found is None or found.never_closes else found


def parse_gate(gate: str | Gate | None) -> Gate | None:
    """As :func:`find_gate`, with gates that never close as they are.

    Raises:
        InvalidInputError: as there.
    """
    if gate is None or isinstance(gate, Gate):
        return gate
    if not isinstance(gate, str):
        raise _bad(gate)
    name, _, number = gate.strip().partition(":")
    if name == NONE and not number:
        return None
    for kind in GATES:
        if kind.name == name:
            return kind(_threshold(gate, number))
    raise _bad(gate)


def checked_gate(gate: str | Gate | None) -> str | None:
    """A gate as a configuration keeps it: its text, or None.

    Raises:
        InvalidInputError: as :func:`find_gate`.
    """
    found = parse_gate(gate)
    return None if found is None else str(found)


def _threshold(gate: str, number: str) -> float:
    try:
        threshold = float(number)
    except ValueError:
        raise _bad(gate) from None
    if not (math.isfinite(threshold) and threshold >= 0):
        raise _bad(gate)
    return threshold


def _bad(gate: object) -> InvalidInputError:
    return InvalidInputError(
        "expected a gate as unsure:T (T a probability), disagreement:T (T in nats) or none, T a finite number from 0, "
        f"got {gate!r}"
    )


def gated(rule: Rule, problem: Problem, gate: Gate | None) -> tuple[Answer, Bool[Tensor, " B"], float]:
    """(the rule's answer where the gate is open and its own elsewhere, where it is closed, seconds of the rule)."""
    closed = torch.zeros_like(problem.log_p[0, :, 0], dtype=torch.bool)
    if gate is not None and not gate.never_closes:
        closed = ~gate.open(rule, problem)
    started = time.perf_counter()
    if gate is None or not closed.any():
        return rule.answer(problem), closed, time.perf_counter() - started
    rows = (~closed).nonzero().squeeze(-1)
    solved = rule.answer(problem.take(rows)) if len(rows) else None
    seconds = time.perf_counter() - started
    answer = gate.instead(rule, problem)
    return answer if solved is None else answer.put(rows, solved), closed, seconds
