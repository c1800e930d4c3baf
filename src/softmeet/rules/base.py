"""The base class of rules: a name, an optimisation problem stated in the docstring, options, and ``solve``.

A user's own rule is a subclass of :class:`Rule`; :mod:`softmeet.rules.registry` makes its name known.
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
    from softmeet.rules.recomputed import Recomputed
    from softmeet.rules.values import SettingValues


class Rule(Frozen, ABC):
    """A way to choose the next token's distribution p from the members' distributions p̂_i: the base class of all rules.

    A subclass sets ``name`` and ``summary`` and defines :meth:`solve`. Its options are pydantic fields, each with a
    default and one line of help: ``order: float = Field(0.5, ge=0, le=1, description="Order of the power mean.")``.
    Instances are immutable; ``str`` of one is the text that ``--rule`` takes: ``power-mean:order=0.5``.

    Attributes:
        name: the name under which the rule is asked for: lower-case letters, digits and hyphens.
        summary: one line about the rule.
        reference: its source: a paper and an equation, or a web address; empty if there is none.
        reads_heads: whether it needs the members' softmax matrices W_i, not only their log-probabilities.
        is_average: whether it is a weighted average of the members.
        takes_signed_weights: whether members' weights may be below 0.
        can_assign_zeros: whether it may give probability 0 to a token to which every member gives more; of an instance,
            where that depends on an option.
        uses_trust: whether its answer depends on the trusts ρ_i.
        tilts_pool: whether its answer is proportional to q exp(Σ_i W_i λ_i), with q the pool and λ_i in
            ``Answer.dual``; only a solution by such a rule can be the ``start`` of another call of ``combine``.
        is_feasible: whether it chooses from the feasible set, all p with W_iᵀ p = W_iᵀ p̂_i for every member i, which
            may be empty.

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
    takes_signed_weights: ClassVar[bool] = False
    can_assign_zeros: ClassVar[bool] = False
    uses_trust: ClassVar[bool] = False
    tilts_pool: ClassVar[bool] = False
    is_feasible: ClassVar[bool] = False

    @abstractmethod
    def solve(self, problem: Problem) -> Answer | Tensor:
        """Choose a distribution over v tokens for each of B rows.

        Args:
            problem: the members' log-probabilities ``problem.log_p``, (n, B, v), in nats, fp64, and all settings; not
                to be changed in place. A rule that reads heads takes them from ``problem.views(range(n))``, which
                applies soft-caps and leaves out the directions that carry no constraint.

        Returns:
            Log-probabilities in nats, (B, v), any floating dtype, if the rule is a formula; else an
            :class:`~softmeet.rules.answer.Answer`, which adds each row's status, gap and dual variables. -inf stands
            for probability 0. ``combine`` raises a RuleError if a row's probabilities do not sum to 1 within 10⁻³, or
            if this method raises an exception that is no SoftmeetError.
        """

    def quick(self, logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor | None:
        """Combine logits at once, if all that this rule reads are the members' distributions; by default, return None.

        Generation calls it where nobody asks for a report, and normalises what it returns.

        Args:
            logits: each member's, (B, v), in nats, fp32 or fp64; -inf for probability 0. Not to be changed in place.
            weights: w_i of each member, none of them 0.

        Returns:
            The logarithms in nats of what :meth:`solve` returns without a support, (B, v), in the dtype of the logits,
            up to a constant in each row, as a new tensor; NaN, +inf or all -inf where :meth:`solve` would raise an
            error.
        """
        return None

    def aggregate(self, log_p: Tensor, weights: Tensor) -> Tensor | None:
        """Return log f(p_1, …, p_n), if the rule is p ∝ f(p̂_1, …, p̂_n) at each token by itself; by default, None.

        f is positively homogeneous where weights sum to 1, so that it is defined of probabilities of any sum, such as
        those of whole texts; decoders call it with these.

        Args:
            log_p: the members' log-probabilities in nats, (n, …), -inf for probability 0.
            weights: w_i of each member, (n,), in the dtype of ``log_p``.

        Returns:
            log f in nats, not normalised, (…).
        """
        return None

    def verify(self, problem: Problem, answer: Answer) -> Recomputed | None:
        """Recompute this rule's answer in fp64 without the solver that found it; by default, return None.

        Args:
            problem: the problem that was solved, with ``problem.dtype`` fp64, for products with heads.
            answer: the answer that was given to its B rows (``answer.log_probs`` may have been altered since), with the
                dual variables and proofs that the solver stored.

        Returns:
            The recomputed distributions, gaps and statuses of all rows; None if the rule cannot recompute them, in
            which case ``Solution.verify`` gives every row the status UNVERIFIED.
        """
        return None

    def pool_bound(self, problem: Problem) -> Tensor | None:
        """Bound how far this rule's objective at the pool is above its optimum, without reading a head.

        The gates ``disagreement`` and ``auto`` call it, with all rows of the problem.

        Returns:
            The bounds in nats, (B,), proved to hold; None, the default, if the rule has no such bound.
        """
        return None

    def effective_trust(self, trust: Sequence[float]) -> tuple[float, ...]:
        """Return the members' trusts that this rule solves with, given the requested ``trust``; the same by default.

        Trusts are in nats per nat, one per member, from 0 to inf, in ``trust`` and in the returned tuple; the rule
        ``max-entropy``, for one, makes all of them infinite.
        """
        return tuple(trust)

    def one_head_weights(self, settings: SettingValues) -> tuple[float, ...] | None:
        """Return the weights of the logit mean that this rule is where one head makes all members' distributions.

        Args:
            settings: those by which members are combined, from :meth:`SettingValues.for_members`.

        Returns:
            A weight for each member, summing to 1; None, the default, if the rule is not known to be such an average.
        """
        return None

    def why_degenerate(self, problem: Problem) -> str:
        """Return a sentence for ``Solution.remark`` that says why the objective is constant on a feasible set.

        ``problem`` is the problem that was solved; at least one of its rows has the status DEGENERATE.
        """
        return "every feasible distribution is optimal: the objective is constant on the feasible set"

    def own_options(self) -> dict[str, object]:
        """Return the rule's options, by name, whose values differ from their defaults."""
        return self.model_dump(exclude_defaults=True)

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{key}={_text(value)}" for key, value in self.own_options().items())])


def _text(value: object) -> str:
    """Format an option's value for a rule's text: booleans in small letters, lists joined by slashes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "/".join(map(_text, value))
    return str(value)
