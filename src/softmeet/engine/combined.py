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


def of_one_each(texts: Sequence[Continuation], drawn: Sequence[int], members: Members) -> Float[Tensor, "B v"]:
    """Have one member read what it has not read of each text, and return its log-probabilities of what follows.

    Args:
        texts: B texts of one ensemble.
        drawn: for each, the number of the member.
        members: those who read.

    Raises:
        SoftmeetError: if a member cannot read a text.
    """
    told, combiner = members.step(list(zip(texts, drawn, strict=True)), texts), texts[0].model.combiner
    for one in texts:
        one.check()
    return quick.of_drawn(combiner.heads, [told[one][0] for one in texts], drawn, combiner.support, combiner.v)
