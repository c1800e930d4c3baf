"""What a rule is: a name, a problem stated in its docstring, options, and ``solve``.

A rule of one's own is a subclass of :class:`Rule`; :mod:`softmeet.rules.registry` makes its name known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from softmeet.rules.frozen import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from softmeet.rules.answer import Answer
    from softmeet.rules.problem import Problem
    from softmeet.rules.verify import Recomputed


class Rule(Frozen, ABC):
    """One way to choose the next token's distribution from the members'.

    Its options are its fields, each with a default, checks and one line of help, as pydantic has them:
    ``order: float = Field(0.5, ge=0, le=1, description="Of the power mean.")``. An instance never changes; ``str`` of
    it is what ``--rule`` takes: ``power-mean:order=0.5``.

    Attributes:
        name: by which it is asked for: small letters, digits and hyphens.
        summary: one line about it.
        reference: where it comes from: a paper and an equation, or an address.
        reads_heads: whether it needs the members' softmax matrices, and not their log-probabilities alone.
        is_average: whether it is a weighted average of the members.
        can_assign_zeros: whether it may give tokens probability 0 to which every member gives more.
        uses_trust: whether its answer depends on the trusts.
        tilts_pool: whether its answer is the pool times exp(Σ_i W_i λ_i), with λ in ``Answer.dual``; such solutions can
            start one another.
        is_feasible: whether it chooses from the distributions that have every member's moments, which may not exist.

    Example:
        >>> import torch
        >>> import softmeet
        >>> from softmeet.simplex import log_normalize
        >>> class Least(softmeet.Rule):
        ...     \"\"\"p ∝ min_i p̂_i.\"\"\"
        ...     name = "least"
        ...     summary = "the pointwise minimum of the members, renormalised"
        ...     def solve(self, problem):
        ...         return problem.restricted(log_normalize(problem.log_p.amin(0)))
        >>> members = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
        >>> heads = [torch.eye(3), torch.eye(3)]
        >>> softmeet.combine(members, heads, Least()).log_probs.exp()
        tensor([0.3333, 0.3333, 0.3333])
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    reads_heads: ClassVar[bool] = False
    is_average: ClassVar[bool] = False
    can_assign_zeros: ClassVar[bool] = False
    uses_trust: ClassVar[bool] = False
    tilts_pool: ClassVar[bool] = False
    is_feasible: ClassVar[bool] = False

    @abstractmethod
    def solve(self, problem: Problem) -> Answer | Tensor:
        """Choose a distribution for every row of a problem.

        Args:
            problem: the members' log-probabilities ``problem.log_p``, (n, B, v), in nats, fp64, and all settings. Where
                directions are free or a soft-cap is set, rows come with views of heads of their own: ask
                ``problem.views``.

        Returns:
            Log-probabilities in nats, (B, v), where the rule is a formula; else an
            :class:`~softmeet.rules.answer.Answer` with what else is known of each row.
        """

    def verify(self, problem: Problem, answer: Answer) -> Recomputed | None:
        """Look at an answer again, in fp64, without trusting the solver that found it.

        Returns:
            What was found, or None where the rule has no such second look: then ``Solution.verify`` says UNVERIFIED.
        """
        return None

    def pool_bound(self, problem: Problem) -> Tensor | None:
        """Bound how far the pool is from this rule's optimum, (B,), in nats and without a head; None if unknown."""
        return None

    def effective_trust(self, trust: Sequence[float]) -> tuple[float, ...]:
        """Give the trusts that this rule solves with, from those that were asked for."""
        return tuple(trust)

    def why_degenerate(self, problem: Problem) -> str:
        """Say why nothing was chosen, in a sentence, for rows whose objective is constant on the feasible set."""
        return "every feasible distribution is optimal: the objective is constant on the feasible set"

    def relaxes(self, problem: Problem) -> bool:
        """Say whether the options ask this rule for less than every member's moments."""
        rank = problem.settings.rank
        if not self.reads_heads or rank is None or problem.settings.free_radial:
            return self.reads_heads and problem.settings.free_radial
        return any(rank < head.whitening().rank for head in problem.heads)

    def own_options(self) -> dict[str, object]:
        """Give the options that differ from their defaults."""
        return {
            name: value
            for name, field in type(self).model_fields.items()
            if (value := getattr(self, name)) != field.get_default()
        }

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{key}={_text(value)}" for key, value in self.own_options().items())])


def _text(value: object) -> str:
    """Write a value as a rule's text has it: lists with slashes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "/".join(map(_text, value))
    return str(value)
