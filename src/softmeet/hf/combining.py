"""From hidden states to the rule's distribution: what an ensemble does once its members have run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softmeet.errors import InvalidInputError, NonFiniteError, UnsupportedHeadError
from softmeet.heads import SoftmaxHead
from softmeet.members.bands import bands
from softmeet.members.work import Work
from softmeet.rules.combine import product_dtype, solve
from softmeet.rules.gates import Unsure
from softmeet.rules.problem import Problem
from softmeet.rules.settings import Settings
from softmeet.rules.solution import Solution
from softmeet.rules.validate import free_directions, normalised, slopes_of

# Elements of fp64 vectors over the vocabulary that one call of combine may hold: 512 MiB.
_ELEMENTS = 1 << 26


def rows_at_once(v: int, n: int) -> int:
    """How many positions n members' distributions over v tokens are combined at."""
    return max(1, _ELEMENTS // (v * 4 * n))


@dataclass
class Asked:
    """At which positions all members ran, and not the first one alone.

    ``logits`` are the first member's at all B positions, where whoever decided has them already; ``seconds`` is what it
    took to run the others.
    """

    rows: Bool[Tensor, " B"]
    logits: Float[Tensor, "B v"] | None = None
    seconds: float = 0.0

    def take(self, rows: slice) -> Asked:
        """Give the same for some of the positions."""
        return Asked(self.rows[rows], None if self.logits is None else self.logits[rows])


class Combining:
    """The heads of an ensemble and its rule, over hidden states that somebody else has computed."""

    config: Any
    heads: list[SoftmaxHead]
    capped: bool
    support: Bool[Tensor, " v"] | None
    _banded: tuple[int, list[SoftmaxHead]] | None

    over_bytes = False

    @property
    def member_heads(self) -> list[SoftmaxHead]:
        """The members' own output layers."""
        return self.heads

    @property
    def widths(self) -> list[int]:
        """Of a row of each member's :meth:`hidden_states`."""
        return [head.d for head in self.heads]

    @property
    def spent(self) -> list[Work]:
        """What each member has cost since it was loaded; known over bytes alone."""
        return []

    def work(self, hidden: Float[Tensor, "t _"]) -> Float[Tensor, "_ 3"]:
        """What rows of a member's :meth:`hidden_states` cost it; known over bytes alone."""
        return hidden.new_zeros(0, 3)

    @property
    def settings(self) -> Settings:
        """How the members are combined."""
        return self.config.settings  # type: ignore[no-any-return]

    def solve_in_chunks(
        self,
        hidden: Sequence[Float[Tensor, "B _"]],
        settings: Settings | None = None,
        asked: Asked | None = None,
        *,
        proved: bool = True,
    ) -> Iterator[tuple[Float[Tensor, "n b v"], Solution]]:
        """As :meth:`solve_rows`, some rows at a time in their order, so that memory stays bounded."""
        chunk = rows_at_once(self.config.vocab_size, len(hidden))
        if len(hidden[0]) <= chunk:
            if len(hidden[0]):
                yield self.solve_rows(hidden, settings, asked, proved=proved)
            return
        for start in range(0, len(hidden[0]), chunk):
            rows = slice(start, start + chunk)
            some = None if asked is None else asked.take(rows)
            yield self.solve_rows([h[rows] for h in hidden], settings, some, proved=proved)

    def solve_rows(
        self,
        hidden: Sequence[Float[Tensor, "B _"]],
        settings: Settings | None = None,
        asked: Asked | None = None,
        *,
        proved: bool = True,
    ) -> tuple[Float[Tensor, "n B v"], Solution]:
        """(the members' log-probabilities, the rule's solution) at B positions, from each member's hidden states.

        Args:
            hidden: (B, d_i) for member i.
            settings: in place of the configuration's, whose gate is for whoever runs members, and not heeded here.
            asked: the rows at which all members ran; elsewhere the first one answers alone, what stands in place of the
                others' hidden states is not read, and what they would say is NaN. None if they ran everywhere.
            proved: end rows on bounds; else an estimate of what is left to gain will do, as in generation.
        """
        logits = self.own_logits(hidden, asked)
        settings = settings or self.settings.ungated()
        if asked is not None:
            settings = settings.model_copy(update={"gate": Unsure(1.0, asked.rows.to(logits.device))})
        states = [h.to(logits.device) for h in hidden] if settings.free_radial else None
        solution = self.combine_rows(logits, logits, settings, hidden=states, proved=proved)
        log_probs = solution.problem.log_p[:: settings.bands]
        return (log_probs, solution) if asked is None else _unasked(log_probs, solution)

    def own_logits(self, hidden: Sequence[Float[Tensor, "B _"]], asked: Asked | None = None) -> Float[Tensor, "n B v"]:
        """The members' logits from each member's hidden states, in fp32 or fp64; -inf past a head's last row.

        Where the members were not ``asked``, all but the first are given equal ones.
        """
        place, v = self.heads[0].weight.device, self.config.vocab_size
        found = []
        for i, (head, states) in enumerate(zip(self.heads, hidden, strict=True)):
            states = states.to(head.weight.device)
            own = head.logits(states) if asked is None else _where_asked(head, states, asked, first=not i)
            own = own.to(place)
            found.append(nn.functional.pad(own, (0, v - head.v), value=-torch.inf) if head.v < v else own)
        return torch.stack(found)

    def own_log_probs(
        self, hidden: Sequence[Float[Tensor, "B _"]]
    ) -> tuple[Float[Tensor, "n B v"], Float[Tensor, "n B v"] | None]:
        """(the members' log-probabilities, their logits if a head has a soft-cap) from each member's hidden states."""
        logits = self.own_logits(hidden)
        return logits.log_softmax(-1), logits if self.capped else None

    def combine_rows(
        self,
        scores: Float[Tensor, "n B v"],
        logits: Float[Tensor, "n B v"] | None,
        settings: Settings | None = None,
        *,
        hidden: Sequence[Float[Tensor, "B _"]] | None = None,
        start: Solution | None = None,
        relaxed: Solution | None = None,
        proved: bool = True,
    ) -> Solution:
        """The rule's solution, from the members' logits, or from their log-probabilities.

        Where the gate ``unsure`` is closed, the first member answers without the rule's temperature too.

        Args:
            scores: log-probabilities up to a constant, which is all that counts of logits without a soft-cap.
            logits: where a head has a soft-cap.
            settings: in place of the configuration's, whose gate is not heeded here.
            hidden: for ``free_radial``.
            start, relaxed: as ``start`` and ``on_infeasible`` of :func:`softmeet.combine`.
            proved: as of :meth:`solve_rows`.

        Raises:
            NonFiniteError: NaN or +inf from a member, which the message names.
        """
        settings = settings or self.settings.ungated()
        heads, dtype = self.heads, scores.dtype
        try:
            log_p = normalised(scores)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. Members, from 0: {', '.join(map(str, self.config.members))}") from error
        if settings.free_radial:
            self._refuse_unknown_norms(settings)
        capped = None if logits is None or not self.capped else logits
        bands = settings.bands
        if bands > 1:
            heads, settings = self.banded_heads(bands), settings.for_bands()
            log_p = log_p.repeat_interleave(bands, 0)
            capped = None if capped is None else capped.repeat_interleave(bands, 0)
        problem = Problem(
            log_p=log_p,
            heads=tuple(heads),
            slopes=(None,) * len(heads) if capped is None else slopes_of(heads, capped, log_p, log_p.shape),
            settings=settings,
            support=self.support,
            dtype=product_dtype(dtype, settings.tol),
            free=free_directions(heads, log_p, capped, hidden, log_p.shape) if settings.free_radial else (),
            start=None if start is None else start.as_start(heads, log_p),
            precision=torch.finfo(dtype).eps,
            proved=proved,
        )
        known = None if relaxed is None else relaxed.as_fallback(problem)
        solution = solve(problem, log_p.shape[1:2], dtype, known)
        return solution if bands == 1 else solution.by_member(bands)

    def _refuse_unknown_norms(self, settings: Settings) -> None:
        if settings.bands > 1:
            raise InvalidInputError(
                f"free_radial needs whole heads, got {settings.bands} bands of each: leave out one of both"
            )
        names = zip(self.config.members, self.heads, strict=True)
        if unknown := [name for name, head in names if head.norm is None]:
            raise UnsupportedHeadError(
                f"free_radial needs a final norm of a known kind right before the output layer, and found none in "
                f"{', '.join(map(str, unknown))}: leave it out"
            )

    def banded_heads(self, count: int) -> list[SoftmaxHead]:
        """``count`` bands of principal directions of each head in turn; made once, together as large as the heads."""
        if count == 1:
            return self.heads
        if self._banded is None or self._banded[0] != count:
            self._banded = count, [band for head in self.heads for band in bands(head, count)]
        return self._banded[1]


def _where_asked(head: SoftmaxHead, states: Float[Tensor, "B d"], asked: Asked, *, first: bool) -> Float[Tensor, "B v"]:
    """A member's logits, in fp32 or fp64; equal ones, and no product with the head, where it was not asked."""
    if first and asked.logits is not None:
        return asked.logits
    if first or bool(asked.rows.all()):
        return head.logits(states)
    out = states.new_zeros(len(states), head.v, dtype=torch.promote_types(states.dtype, torch.float32))
    rows = asked.rows.nonzero().squeeze(-1).to(states.device)
    return out.index_copy(0, rows, head.logits(states[rows]).to(out.device)) if len(rows) else out


def _unasked(log_probs: Float[Tensor, "n B v"], solution: Solution) -> tuple[Float[Tensor, "n B v"], Solution]:
    """With NaN wherever a member did not run."""
    log_probs = log_probs.clone()
    disagreement = solution.disagreement.clone()
    log_probs[1:, solution.gated] = torch.nan
    disagreement[1:, solution.gated] = torch.nan
    return log_probs, replace(solution, disagreement=disagreement)
