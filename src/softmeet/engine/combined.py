"""What a rule makes of the newest places of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.engine import quick
from softmeet.engine.ask import Hidden, Members
from softmeet.engine.continuation import Continuation
from softmeet.engine.deferral import Drawn
from softmeet.engine.gate import joined
from softmeet.rules.problem import TokensBefore
from softmeet.rules.settings import Settings
from softmeet.rules.solution import Solution


@dataclass(frozen=True, eq=False)
class Combined:
    """What a rule makes of B positions.

    Attributes:
        ours: (B, v), the rule's log-probabilities in nats.
        members: (n, B, v), the members' own; None of an average that was computed without them.
        solution: how the rule was solved; None of such an average.
    """

    ours: Float[Tensor, "B v"]
    members: Float[Tensor, "n B v"] | None = None
    solution: Solution | None = None


def combined(
    texts: Sequence[Continuation], hidden: Sequence[Hidden], settings: Settings, *, quickly: bool
) -> Iterator[Combined]:
    """Combine the members at the newest place of each text, in chunks of texts that bound memory.

    Args:
        texts: B texts of one ensemble.
        hidden: for each text, each member's last hidden states there, (1, d_i).
        settings: those by which they are combined, from :meth:`Settings.for_members`.
        quickly: whether an average may be computed without what a report needs, which rounds otherwise.

    Raises:
        SoftmeetError: as :meth:`Combiner.combine_rows`.
    """
    model, asked = texts[0].model, joined(texts)
    stacked = [torch.cat(member) for member in zip(*hidden, strict=True)]
    if quickly and asked is None and (found := model.combiner.quickly(stacked, settings)) is not None:
        yield Combined(found)
        return
    before = TokensBefore.of(torch.tensor([one.tokens[-1] for one in texts]), model.tokenizer)
    for log_probs, solution in model.combiner.solve_in_chunks(stacked, settings, asked, before, proved=False):
        yield Combined(solution.log_probs, log_probs, solution)


def one_each(texts: Sequence[Continuation], drawn: Sequence[int], members: Members) -> list[Float[Tensor, "B _"]]:
    """Have of each text one member read what it has not read.

    Args:
        texts: B texts of one ensemble.
        drawn: for each, the number of the member.
        members: those who read.

    Returns:
        each member's last hidden states at the newest token, (B, d_i), zeros for texts for which it was not drawn.

    Raises:
        SoftmeetError: if a member cannot read a text.
    """
    found = []
    for i, head in enumerate(texts[0].model.combiner.heads):
        rows = [k for k, member in enumerate(drawn) if member == i]
        states = torch.zeros(len(texts), head.d, dtype=head.dtype, device=head.device)
        told = members.read_on([texts[k] for k in rows], slice(i, i + 1)) if rows else {}
        for one in told:
            one.check()
        if told:
            states[rows] = torch.cat([own for (own,) in told.values()]).to(states)
        found.append(states)
    return found


def of_one_each(texts: Sequence[Continuation], drawn: Sequence[int], members: Members) -> Float[Tensor, "B v"]:
    """Return of each text the log-probabilities, in nats, of the one member that was drawn for it."""
    combiner = texts[0].model.combiner
    found = one_each(texts, drawn, members)
    return quick.of_drawn(combiner.heads, found, Drawn(torch.tensor(drawn)), combiner.support, combiner.v)
