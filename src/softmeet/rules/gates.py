"""Gates: they decide in which rows the rule is worth its cost, before any head is read for it.

``unsure:T``         the first member answers alone, unless its largest next-token probability is below T.
``disagreement:T``   the pool answers, unless the members' first-order disagreement exceeds T nats.
``safe:T``           the first member answers alone where members agree, or one would write across the place.
``auto``             ``disagreement:0.08`` for ``meet`` with finite trusts: the default of generation and serving.

The members' first-order disagreement is Σ_i ρ_i KL(q‖p̂_i), with q the pool, p̂_i the members' distributions and ρ_i
their trusts. A gate is a subclass of :class:`Gate`, named in ``GATES``; it sees the problem, and by
``problem.text_before()`` the text of the token before each row. If ``unsure`` is closed, the other members need not
run, which saves most; the other gates need every member and save the solve. ``unsure:T`` with T above 1 and
``disagreement:0`` never close, and are treated as no gate.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.errors import InvalidInputError, RuleError
from softmeet.rules.answer import Answer, closed_form
from softmeet.rules.answered import answered
from softmeet.rules.problem import Problem

if TYPE_CHECKING:
    from softmeet.rules.values import SettingValues


@dataclass(frozen=True)
class Gate(ABC):
    """A test of rows before any head is read: the rule solves rows at which the gate is open, the gate answers others.

    For each problem :meth:`open` is called once, then the rule is solved in the open rows, then :meth:`instead` is
    called if any row is closed. If :attr:`never_closes` is True, neither is called.

    Attributes:
        threshold: the number after the colon in the gate's text, such as 0.5 in ``unsure:0.5``; at least 0.
        name: the text before the colon; a subclass has to set one that no other gate has.
        form: the form of the text with the number's unit, for messages, such as ``unsure:T (T a probability)``.
        first_alone: whether the first member answers alone where it is closed.
    """

    threshold: float

    name: ClassVar[str]
    form: ClassVar[str]  # of its text, for messages
    first_alone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise InvalidInputError(f"expected a gate {self.form} with T at least 0, got {self.threshold!r}")

    def __str__(self) -> str:
        return f"{self.name}:{self.threshold!r}"

    @property
    @abstractmethod
    def never_closes(self) -> bool:
        """Whether the gate is treated as no gate, since it would be open in every row, or could spare nothing."""

    @abstractmethod
    def open(self, problem: Problem) -> Bool[Tensor, " B"]:
        """Return a bool mask, (B,), on the device of ``problem.log_p``: True in rows that the rule is to solve."""

    @abstractmethod
    def instead(self, problem: Problem) -> Answer:
        """Return the gate's answers to all B rows, of which those at which it is closed are used; reads no head.

        :func:`softmeet.rules.answer.closed_form` makes an answer from log-probabilities.
        """


@dataclass(frozen=True)
class Unsure(Gate):
    """The gate ``unsure``: the first member answers alone, unless its largest token probability is below ``threshold``.

    Its answer is the rule's for an ensemble of the first member alone: its own distribution (with the rule ``one-hot``,
    all mass on its most probable token). The distance to the answer of all members is unknown: the gap is infinite.

    Args:
        threshold: a probability; above 1 the gate never closes.
        asked: a bool mask, (B,), True in rows at which the gate is open, if that was decided earlier, when the members
            ran (ensembles set it); None, the default, to decide from the first member's probabilities.
    """

    asked: Bool[Tensor, " B"] | None = field(default=None, compare=False)

    name = "unsure"
    form = "unsure:T (T a probability)"
    first_alone = True

    @property
    def never_closes(self) -> bool:
        """Whether the gate is open in every row: ``threshold`` is above 1, and every probability is below it."""
        return self.threshold > 1

    def open(self, problem: Problem) -> Bool[Tensor, " B"]:
        """Return ``asked``, or, if it is None, the mask :meth:`among` of rows in which the first member is unsure."""
        return self.among(problem.log_p[0]) if self.asked is None else self.asked

    def among(self, log_p: Float[Tensor, "B v"]) -> Bool[Tensor, " B"]:
        """Return a mask, (B,), of the rows in which the first member's largest probability is below ``threshold``.

        Args:
            log_p: the first member's log-probabilities in nats.
        """
        return confidence(log_p) < self.threshold

    def instead(self, problem: Problem) -> Answer:
        """Return the rule's answer for the first member alone, for all rows, with gap inf, not certified.

        For a rule that reads heads that is the first member's own distribution on the support; another rule is solved
        with this member at weight 1.

        Raises:
            RuleError: if the rule fails.
            DisjointSupportError: if the first member has no mass on the support in a row.
        """
        return _of_the_first(problem)


def _of_the_first(problem: Problem) -> Answer:
    """Return the rule's answer for the first member alone, with gap inf, not certified."""
    rule = problem.settings.rule
    alone = replace(
        problem,
        log_p=problem.log_p[:1],
        heads=problem.heads[:1],
        slopes=problem.slopes[:1],
        settings=problem.settings.model_copy(update={"weights": (1.0,), "trust": problem.trust[:1]}),
        states=problem.states[:1],
    )
    # Rules that read heads would answer with this one member's own distribution.
    own = closed_form(alone, alone.log_pool) if rule.reads_heads else answered(rule, alone)
    answer = closed_form(problem, own.log_probs, own.objective)
    unknown = torch.full_like(answer.gap, torch.inf)
    return replace(answer, gap=unknown, certified=unknown < 0)


@dataclass(frozen=True)
class Safe(Gate):
    """The gate ``safe``: members are combined only where that is safe, and they disagree (SAFE, Yun et al., 2025).

    It is open where no member's tokenizer writes the token before and the first member's likeliest next one by a token
    across the place; the members' likeliest tokens differ; and the mean of the probabilities that they give to the
    first one's is at most ``threshold``. Elsewhere the first member answers alone. All members run at every place: what
    is gained is steadiness, hardly time.

    The authors' code (https://github.com/yoon6503/SAFE) was not seen: it follows what others tell of the paper
    (arXiv:2510.15346). There the first member drafts five tokens, of which the others look at all; here they look at
    one. Its sharpening of what is combined is not part of the gate.

    Args:
        threshold: a probability.
    """

    threshold: float = 0.5

    name = "safe"
    form = "safe:T (T a probability)"
    first_alone = True

    @property
    def never_closes(self) -> bool:
        """False: where members agree, it is closed for every threshold."""
        return False

    def open(self, problem: Problem) -> Bool[Tensor, " B"]:
        """Return a mask, (B,), of the rows in which the members are to be combined."""
        likeliest = problem.log_p.argmax(-1)
        first = likeliest[0]
        mean = problem.log_p.gather(-1, first.expand(len(likeliest), -1)[..., None]).exp().mean(0).squeeze(-1)
        found = (likeliest != first).any(0) & (mean <= self.threshold)
        if problem.before is None or problem.before.crossed is None:
            return found
        crossed = map(problem.before.crossed, problem.before.ids.tolist(), first.tolist())
        return found & ~torch.tensor(list(crossed), device=found.device)

    def instead(self, problem: Problem) -> Answer:
        """Return the rule's answer for the first member alone, for all rows, with gap inf, not certified."""
        return _of_the_first(problem)


@dataclass(frozen=True)
class Disagreement(Gate):
    """The gate ``disagreement``: the pool answers, unless the first-order disagreement exceeds ``threshold`` nats.

    That is Σ_i ρ_i KL(q‖p̂_i), q the pool, p̂_i the members and ρ_i their trusts. For ``meet`` with finite trusts the
    pool is then proved to be within ``threshold`` nats of the optimum, as the row's certified gap says. For a rule that
    reads no head the gate is always open, as there is no solve to save.

    Args:
        threshold: in nats; at 0 the gate never closes.
    """

    name = "disagreement"
    form = "disagreement:T (T in nats)"

    @property
    def never_closes(self) -> bool:
        """Whether ``threshold`` is 0, so that the gate counts as none.

        It could close only rows in which the distribution of every member of positive trust is the pool.
        """
        return self.threshold <= 0

    def open(self, problem: Problem) -> Bool[Tensor, " B"]:
        """Return a mask, (B,), of rows with first-order disagreement above ``threshold``; all, if no heads are read."""
        if not problem.settings.rule.reads_heads:
            return torch.ones_like(problem.log_p[0, :, 0], dtype=torch.bool)
        return problem.pool_bound() > self.threshold

    def instead(self, problem: Problem) -> Answer:
        """Return the pool as the answer to all rows, with ``Rule.pool_bound`` in nats as its certified gap.

        If the rule's ``pool_bound`` is None, the gap is inf and not certified. The objective is given as 0.
        """
        answer = closed_form(problem, problem.log_pool, torch.zeros_like(problem.log_pool[:, 0]))
        bound = problem.settings.rule.pool_bound(problem)
        gap = torch.full_like(answer.gap, torch.inf) if bound is None else bound
        return replace(answer, gap=gap, certified=gap.isfinite())


@dataclass(frozen=True)
class Automatic(Disagreement):
    """The gate ``auto``: ``disagreement:0.08`` for rules that move the pool by finite trusts, and no gate for others.

    On held-out text of both bundled families it costs at most 0.001 nats a token (``benchmarks/gates.py curves``).
    """

    threshold: float = 0.08

    name = "auto"
    form = "auto"

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def may_close(settings: SettingValues) -> bool:
        """Return whether the rule moves the pool, with two trusts or more, all of them finite and not all 0."""
        trust = settings.rule.effective_trust(settings.member_trust)
        return settings.rule.tilts_pool and any(trust) and not any(map(math.isinf, trust)) and len(trust) > 1

    def open(self, problem: Problem) -> Bool[Tensor, " B"]:
        """Return a bool mask, (B,), of rows that the rule is to solve: all, if the gate may not close for it."""
        if not self.may_close(problem.settings):
            return torch.ones_like(problem.log_p[0, :, 0], dtype=torch.bool)
        return super().open(problem)


def confidence(log_p: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """Return the probability of the most probable token, from log-probabilities in nats."""
    return log_p.amax(-1).exp()


GROUP = "softmeet.gates"
GATES: dict[str, type[Gate]] = {kind.name: kind for kind in (Unsure, Disagreement, Safe, Automatic)}


def _of_package(name: str) -> type[Gate] | None:
    """Import the gate that a package makes known under a name by an entry point, and keep it; None if none does.

    Raises:
        RuleError: if the package fails to provide a gate of that name.
    """
    for entry in entry_points(group=GROUP, name=name):
        where = f"the gate {name!r} of {entry.value}"
        try:
            kind = entry.load()
        except Exception as error:
            raise RuleError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, Gate) and getattr(kind, "name", None) == name):
            raise RuleError(f"{where} is {kind!r}: expected a subclass of softmeet.rules.gates.Gate with that name")
        GATES[name] = kind
        return kind
    return None


def parse_gate(gate: str | Gate | None) -> Gate | None:
    """Parse a gate's text ``NAME:THRESHOLD``, such as ``unsure:0.5``; return None for None and ``none``.

    A :class:`Gate` is returned unchanged, unless its name is that of another class. NAME is a key of ``GATES``, or that
    of a package's entry point of the group ``softmeet.gates``. ``:THRESHOLD`` may be left out if the class has one.

    Raises:
        InvalidInputError: if there is no gate of that name, or its threshold is not a finite number of at least 0; if
            an instance has the name of a gate in ``GATES`` of which it is not.
        RuleError: if a package that announces the gate fails to provide it.
    """
    if isinstance(gate, Gate):
        if GATES.get(gate.name, type(gate)) is not type(gate):
            raise InvalidInputError(
                f"expected a gate with a name of its own, got {type(gate).__name__} with that of "
                f"{GATES[gate.name].__name__}, {gate.name!r}: set another name in the class"
            )
        return gate
    if gate is None or gate == "none":
        return None
    name, _, number = str(gate).strip().partition(":")
    if name == "movement":
        raise InvalidInputError(f"there is no gate movement since 0.3.0, got {gate!r}: use auto, or disagreement:T")
    kind: Any = GATES.get(name) or _of_package(name)
    if kind is not None and not number and hasattr(kind, "threshold"):  # one that has a default
        return kind()  # type: ignore[no-any-return]
    try:
        threshold = float(number)
    except ValueError:
        threshold = math.nan
    if kind is None or not 0 <= threshold < math.inf:
        forms = ", ".join(one.form for one in GATES.values())
        raise InvalidInputError(f"expected a gate as {forms} or none, T a finite number from 0, got {gate!r}")
    return kind(threshold)  # type: ignore[no-any-return]


def that_closes(gate: Gate | None) -> Gate | None:
    """Return ``gate``; but None if ``gate`` is None, or its :attr:`Gate.never_closes` is True."""
    return None if gate is None or gate.never_closes else gate


def unsure_of(gate: Gate | None) -> Unsure | None:
    """Return the gate if it is ``unsure`` and may close, by which members after the first need not always run."""
    found = that_closes(gate)
    return found if isinstance(found, Unsure) else None


def gated(problem: Problem) -> tuple[Answer, Bool[Tensor, " B"], float]:
    """Solve a problem by its rule in the rows at which its gate is open, and answer the others by the gate.

    Rule and gate are ``problem.settings.rule`` and ``problem.settings.gate``; without a gate all rows are open.

    Returns:
        (the answer to all B rows; a bool mask, (B,), True in rows at which the gate is closed; the seconds that the
        rule took for the open rows, without the gate's own).

    Raises:
        RuleError: if the rule fails, as by :func:`softmeet.rules.answered.answered`.
        InvalidInputError: if the gate needs a text that is unknown.
        DisjointSupportError: if a row has no token left for the pool or the rule.
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
