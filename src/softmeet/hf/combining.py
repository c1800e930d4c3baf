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
from softmeet.rules.combine import combine
from softmeet.rules.gates import Gate, Unsure, find_gate
from softmeet.rules.solution import Solution
from softmeet.rules.validate import checked_trust

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
        """Some positions."""
        return Asked(self.rows[rows], None if self.logits is None else self.logits[rows])


class Combining:
    """The heads of an ensemble and its rule, over hidden states that somebody else has computed."""

    config: Any
    heads: list[SoftmaxHead]
    support: Bool[Tensor, " v"] | None
    _banded: tuple[int, list[SoftmaxHead]] | None

    def solve_in_chunks(
        self, hidden: Sequence[Float[Tensor, "B _"]], asked: Asked | None = None, **changes: Any
    ) -> Iterator[tuple[Float[Tensor, "n b v"], Solution]]:
        """As :meth:`solve_rows`, some rows at a time in their order, so that memory stays bounded."""
        chunk = rows_at_once(self.config.vocab_size, len(hidden))
        for start in range(0, len(hidden[0]), chunk):
            rows = slice(start, start + chunk)
            yield self.solve_rows([h[rows] for h in hidden], None if asked is None else asked.take(rows), **changes)

    def solve_rows(
        self, hidden: Sequence[Float[Tensor, "B _"]], asked: Asked | None = None, **changes: Any
    ) -> tuple[Float[Tensor, "n B v"], Solution]:
        """(the members' log-probabilities, the rule's solution) at B positions, from each member's hidden states.

        Args:
            hidden: (B, d_i) for member i.
            asked: the rows at which all members ran; elsewhere the first one answers alone, what stands in place of the
                others' hidden states is not read, and what they would say is NaN. None if they ran everywhere.
            changes: as :meth:`combine_rows` has them.
        """
        log_probs, logits = self.own_log_probs(hidden, asked)
        if asked is not None:
            changes["gate"] = Unsure(1.0, asked.rows.to(log_probs.device))
        if changes.get("free_radial", self.config.free_radial):
            changes["hidden"] = [states.to(log_probs.device) for states in hidden]
        solution = self.combine_rows(log_probs, logits, **changes)
        return (log_probs, solution) if asked is None else _unasked(log_probs, solution)

    def own_log_probs(
        self, hidden: Sequence[Float[Tensor, "B _"]], asked: Asked | None = None
    ) -> tuple[Float[Tensor, "n B v"], Float[Tensor, "n B v"] | None]:
        """(the members' log-probabilities, their logits if a head has a soft-cap) from each member's hidden states.

        Where the members were not ``asked``, all but the first are given a uniform distribution.
        """
        own_log_probs, logits, place = [], [], self.heads[0].weight.device
        for i, (head, states) in enumerate(zip(self.heads, hidden, strict=True)):
            own = _own_logits(head, states) if asked is None else _where_asked(head, states, asked, first=not i)
            own = own.to(place)
            short = self.config.vocab_size - head.v
            own = nn.functional.pad(own, (0, short), value=-torch.inf) if short else own
            logits.append(own)
            own_log_probs.append(own.log_softmax(-1))
        capped = torch.stack(logits) if any(head.soft_cap for head in self.heads) else None
        return torch.stack(own_log_probs), capped

    def combine_rows(
        self, log_probs: Float[Tensor, "n B v"], logits: Float[Tensor, "n B v"] | None, **changes: Any
    ) -> Solution:
        """The rule's solution, from what :meth:`own_log_probs` gives.

        ``changes`` are ``rule_temperature`` and arguments of :func:`softmeet.combine` in place of the configuration's.
        A gate is one of them; that of the configuration is for whoever runs members, and not heeded here. Where
        ``unsure`` is closed, the first member answers without the rule's temperature too.
        """
        arguments = self.config.combine_arguments() | changes
        temperature = arguments.pop("rule_temperature", self.config.rule_temperature)
        count, heads = arguments.pop("bands", self.config.bands), self.heads
        if arguments["free_radial"]:
            self._refuse_unknown_norms()
            if count > 1:
                raise InvalidInputError(
                    f"free_radial needs whole heads, got {count} bands of each: leave out one of both"
                )
        if count > 1:
            heads = self.banded_heads(count)
            log_probs = log_probs.repeat_interleave(count, 0)
            logits = None if logits is None else logits.repeat_interleave(count, 0)
            # The pool knows each member once.
            first = ([w, *[0.0] * (count - 1)] for w in arguments["weights"])
            arguments["weights"] = [w for own in first for w in own]
            arguments["trust"] = checked_trust(arguments["trust"], len(self.heads), count)
        try:
            solution = combine(log_probs, heads, support=self.support, logits=logits, **arguments)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. Members, from 0: {', '.join(map(str, self.config.members))}") from error
        solution = solution if count == 1 else solution.by_member(count)
        return solution if temperature == 1 else _tempered(solution, temperature, arguments.get("gate"))

    def _refuse_unknown_norms(self) -> None:
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


def _own_logits(head: SoftmaxHead, states: Float[Tensor, "B d"]) -> Float[Tensor, "B v"]:
    return head.logits(states.to(head.weight.device))


def _where_asked(head: SoftmaxHead, states: Float[Tensor, "B d"], asked: Asked, *, first: bool) -> Float[Tensor, "B v"]:
    """A member's logits, in fp32 or fp64; equal ones, and no product with the head, where it was not asked."""
    if first and asked.logits is not None:
        return asked.logits
    if first or bool(asked.rows.all()):
        return _own_logits(head, states)
    out = states.new_zeros(len(states), head.v, dtype=torch.promote_types(states.dtype, torch.float32))
    rows = asked.rows.nonzero().squeeze(-1).to(states.device)
    return out.index_copy(0, rows, _own_logits(head, states[rows]).to(out.device)) if len(rows) else out


def _unasked(log_probs: Float[Tensor, "n B v"], solution: Solution) -> tuple[Float[Tensor, "n B v"], Solution]:
    """With NaN wherever a member did not run."""
    log_probs = log_probs.clone()
    disagreement = solution.disagreement.clone()
    log_probs[1:, solution.gated] = torch.nan
    disagreement[1:, solution.gated] = torch.nan
    return log_probs, replace(solution, disagreement=disagreement)


def _tempered(solution: Solution, temperature: float, gate: str | Gate | None) -> Solution:
    found = solution.at_temperature(temperature)
    if not isinstance(find_gate(gate), Unsure):
        return found
    return replace(found, log_probs=torch.where(solution.gated[:, None], solution.log_probs, found.log_probs))
