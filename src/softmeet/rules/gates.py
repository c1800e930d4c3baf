"""Gates: at which positions the rule is worth its cost, decided before any head is read for it.

``unsure:T``         the first member answers alone, unless its largest next-token probability is below T.
``disagreement:T``   the pool answers, unless the members' first-order disagreement exceeds T nats.
``movement:T``       the pool answers, unless the rule is predicted to move it by T nats or more.
``auto``             ``movement`` at a threshold that no text can feel: the default of generation and serving.

A gate is a subclass of :class:`Gate`, named in ``GATES``; it sees the problem, and by ``problem.text_before()`` the
text of the token before each row. Where ``unsure`` is closed nobody else needs to run, which is what saves most; the
others need every member and save the solve. ``unsure:T`` with T above 1, ``disagreement:0`` and ``movement:0`` are no
gates, and are treated as none.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.answered import answered
from softmeet.rules.problem import Problem


@dataclass(frozen=True)
class Gate(ABC):
    """A decision, before any head is read, where a rule is solved, and what answers where it is not."""

    threshold: float

    name: ClassVar[str]
    form: ClassVar[str]  # of its text, for messages

    def __str__(self) -> str:
        return f"{self.name}:{self.threshold!r}"

    @property
    @abstractmethod
    def never_closes(self) -> bool:
        """Whether the rule is solved everywhere, whatever the members say."""

    @abstractmethod
    def open(self, problem: Problem) -> Bool[Tensor, " B"]:
        """Return a mask of the rows that the rule is solved at."""

    @abstractmethod
    def instead(self, problem: Problem) -> Answer:
        """Return what answers every row where the rule is not solved; no head is read."""


@dataclass(frozen=True)
class Unsure(Gate):
    """The first member alone, unless the probability of its most probable token is below ``threshold``.

    What it answers there is what the rule makes of one member: its own distribution (or, by ``one-hot``, its most
    probable token). How far that is from what the rule would say is not known: the gap is infinite.

    Args:
        threshold: a probability; above 1 the gate never closes.
        asked: (B,), the rows at which the others were asked, where that was decided when they ran; else it is decided
            from the first member's probabilities.
    """

    asked: Bool[Tensor, " B"] | None = field(default=None, compare=False)

    name = "unsure"
    form = "unsure:T (T a probability)"

    @property
    def never_closes(self) -> bool:
        """Above 1, since no probability is."""
        return self.threshold > 1

    def open(self, problem: Problem) -> Bool[Tensor, " B"]:
        """Open rows at which the first member is not confident."""
        return self.among(problem.log_p[0]) if self.asked is None else self.asked

    def among(self, log_p: Float[Tensor, "B v"]) -> Bool[Tensor, " B"]:
        """Return a mask of the rows at which the others have to be asked, from the first member's log-probabilities."""
        return confidence(log_p) < self.threshold

    def instead(self, problem: Problem) -> Answer:
        """Answer by the first member alone."""
        rule = problem.settings.rule
        alone = replace(
            problem,
            log_p=problem.log_p[:1],
            heads=problem.heads[:1],
            slopes=problem.slopes[:1],
            settings=problem.settings.model_copy(update={"weights": (1.0,), "trust": problem.trust[:1]}),
            free=problem.free[:1],
        )
        # What reads heads makes of one member its own distribution.
        own = closed_form(alone, alone.log_pool) if rule.reads_heads else answered(rule, alone)
        answer = closed_form(problem, own.log_probs, own.objective)
        unknown = torch.full_like(answer.gap, torch.inf)
        return replace(answer, gap=unknown, certified=unknown < 0)


@dataclass(frozen=True)
class Disagreement(Gate):
    """The pool, unless the members' first-order disagreement exceeds ``threshold`` nats.

    For ``meet`` with finite trusts a closed row is within ``threshold`` of optimal, and says so in its certified gap.
    A rule that reads no head solves nothing that could be left out: its gate is always open.
    """

    name = "disagreement"
    form = "disagreement:T (T in nats)"

    @property
    def never_closes(self) -> bool:
        """At 0 only rows on which all agree are left, which cost nothing anyway."""
        return self.threshold <= 0

    def open(self, problem: Problem) -> Bool[Tensor, " B"]:
        """Open rows at which members disagree about the pool by more than the threshold."""
        if not problem.settings.rule.reads_heads:
            return torch.ones_like(problem.log_p[0, :, 0], dtype=torch.bool)
        return problem.pool_bound() > self.threshold

    def instead(self, problem: Problem) -> Answer:
        """Answer by the pool; its gap is what the rule could still gain over it, where that is known."""
        answer = closed_form(problem, problem.log_pool, torch.zeros_like(problem.log_pool[:, 0]))
        bound = problem.settings.rule.pool_bound(problem)
        gap = torch.full_like(answer.gap, torch.inf) if bound is None else bound
        return replace(answer, gap=gap, certified=gap.isfinite())


@dataclass(frozen=True)
class PredictedMovement(Disagreement):
    """The pool, where the rule is predicted to move it by less than ``threshold`` nats, KL(p‖q).

    The prediction is Σ ρ_i KL(q‖p̂_i), which needs no head, times a factor that belongs to the members, the pool and the
    trusts: the mean movement over the mean of that sum, on text of the ensemble's own (``hf/calibrated.py``). The bound
    that a closed row has for its gap is the sum itself, which is far larger. A rule that does not move a pool, or at
    infinite trust, is always asked.

    Args:
        threshold: in nats a token; at 0 the gate never closes.
        factor: None until it is known.
        auto: whether the threshold is the default one.
    """

    factor: float | None = field(default=None, compare=False)
    auto: bool = field(default=False, compare=False)

    name = "movement"
    form = "movement:T (T in nats)"

    def __str__(self) -> str:
        return "auto" if self.auto else super().__str__()

    def open(self, problem: Problem) -> Bool[Tensor, " B"]:
        """Open rows that the rule is predicted to move by the threshold or more.

        Raises:
            InvalidInputError: no factor is known.
        """
        free = problem.settings.rule.pool_bound(problem)
        if free is None:
            return torch.ones_like(problem.log_p[0, :, 0], dtype=torch.bool)
        if self.factor is None:
            raise InvalidInputError(
                f"expected a gate that needs no calibration, got {self}, which only an Ensemble can have: use "
                "disagreement:T"
            )
        return self.factor * free >= self.threshold


def confidence(log_p: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """Return the probability of the most probable token."""
    return log_p.amax(-1).exp()


GATES: dict[str, type[Gate]] = {kind.name: kind for kind in (Unsure, Disagreement, PredictedMovement)}
# Where ``auto`` closes: on held-out text of both bundled families it then gives up no more than 10⁻³ nats a token.
_AUTO = 3e-3


def parse_gate(gate: str | Gate | None) -> Gate | None:
    """Read a gate from a text such as ``unsure:0.5``; return None for None and for ``none``.

    Raises:
        InvalidInputError: there is no such gate, or its threshold is not a finite number from 0.
    """
    if gate is None or isinstance(gate, Gate) or gate == "none":
        return gate if isinstance(gate, Gate) else None
    if gate == "auto":
        return PredictedMovement(_AUTO, auto=True)
    name, _, number = str(gate).strip().partition(":")
    kind: Any = GATES.get(name)
    if kind is not None and not number and hasattr(kind, "threshold"):  # one that has a default
        return kind()  # type: ignore[no-any-return]
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    if kind is None or not 0 <= threshold < math.inf:
        forms = ", ".join(one.form for one in GATES.values())
        raise InvalidInputError(f"expected a gate as {forms}, auto or none, T a finite number from 0, got {gate!r}")
    return kind(threshold)  # type: ignore[no-any-return]


def that_closes(gate: Gate | None) -> Gate | None:
    """Return the gate, or None where it never closes."""
    return None if gate is None or gate.never_closes else gate


def gated(problem: Problem) -> tuple[Answer, Bool[Tensor, " B"], float]:
    """Ask the rule where the gate is open.

    Returns:
        (the rule's answer there and the gate's own elsewhere, where the gate is closed, seconds that the rule took).
    """
    settings = problem.settings
    gate, rule = that_closes(settings.gate), settings.rule
    closed = torch.zeros_like(problem.log_p[0, :, 0], dtype=torch.bool) if gate is None else ~gate.open(problem)
    started = time.perf_counter()
    if gate is None or not closed.any():
        return answered(rule, problem), closed, time.perf_counter() - started
    rows = (~closed).nonzero().squeeze(-1)
    solved = answered(rule, problem.take(rows)) if len(rows) else None
    seconds = time.perf_counter() - started
    answer = gate.instead(problem)
    return answer if solved is None else answer.put(rows, solved), closed, seconds
