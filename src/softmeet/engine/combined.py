"""What a rule makes of the newest places of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.engine import quick
from softmeet.engine.ask import Hidden, Members
from softmeet.engine.claims import claim_drawn
from softmeet.engine.continuation import Continuation, Ensembled
from softmeet.engine.deferral import Deferral
from softmeet.engine.gate import joined
from softmeet.engine.recorder import Recorder
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
        logits: of such an average, each member's logits, (B, v_i).
        claiming: of such an average, what readers that claim told, as :func:`claimed` takes it.
    """

    ours: Float[Tensor, "B v"]
    members: Float[Tensor, "n B v"] | None = None
    solution: Solution | None = None
    logits: Sequence[Float[Tensor, "B _"]] = ()
    claiming: Sequence[Float[Tensor, "B _"]] = ()

    def claims(self, row: int) -> list[float]:
        """Return the share of the answer that each reader which claims took at one of the positions."""
        if self.solution is None:
            return [own[row, -1].exp().item() for own in self.claiming]
        return [] if self.solution.claims is None else self.solution.claims[:, row].tolist()

    def tell(self, recorder: Recorder) -> None:
        """Have a recorder count these positions."""
        if self.solution is not None and self.members is not None:
            recorder.add(self.solution, self.members)
        elif self.logits:
            recorder.add_average(self.logits)


def combined(
    texts: Sequence[Continuation], hidden: Sequence[Hidden], settings: Settings, *, quickly: bool
) -> Iterable[Combined]:
    """Combine the members at the newest place of each text, in chunks of texts that bound memory.

    Args:
        texts: B texts of one ensemble.
        hidden: for each text, each member's last hidden states there, (1, d_i).
        settings: those by which they are combined, from :meth:`Settings.for_members`.
        quickly: whether an average may be computed without what a report needs, which rounds otherwise.

    Raises:
        SoftmeetError: as :meth:`Combiner.combine_rows`.
    """
    model = texts[0].model
    stacked = [torch.cat(member) for member in zip(*hidden, strict=True)]
    return of_rows(
        model,
        stacked,
        settings,
        joined(texts),
        lambda: torch.tensor([one.tokens[-1] for one in texts]),
        quickly=quickly,
    )


def of_rows(
    model: Ensembled,
    hidden: Sequence[Float[Tensor, "B _"]],
    settings: Settings,
    asked: Deferral | None,
    before: Callable[[], Int[Tensor, " B"]],
    *,
    quickly: bool,
) -> Iterable[Combined]:
    """Combine the members at B places, in chunks that bound memory.

    Args:
        model: the ensemble.
        hidden: each member's last hidden states there, (B, d_i).
        settings, quickly: as of :func:`combined`.
        asked: at which places all members have read, not the first alone; None for all of them.
        before: returns the token before each place, for gates that look at the text.

    Raises:
        SoftmeetError: as :meth:`Combiner.combine_rows`.
    """
    combiner = model.combiner
    if quickly and asked is None and (found := combiner.quickly(hidden, settings)) is not None:
        return [Combined(found[0], logits=found[1], claiming=hidden[len(combiner.heads) :])]
    known = TokensBefore.of(before(), model.tokenizer)
    solved = combiner.solve_in_chunks(hidden, settings, asked, known, proved=False)
    return (Combined(solution.log_probs, log_probs, solution) for log_probs, solution in solved)


def of_one_each(
    texts: Sequence[Continuation], drawn: Sequence[int], members: Members, chance: Callable[[], float]
) -> Float[Tensor, "B v"]:
    """Have one member read what it has not read of each text, and return its log-probabilities of what follows.

    A reader that claims answers in the member's place as often as it claims, and then no member reads.

    Args:
        texts: B texts of one ensemble.
        drawn: for each, the number of the member.
        members: those who read.
        chance: returns a number drawn evenly from [0, 1).

    Raises:
        SoftmeetError: if a member cannot read a text.
    """
    model, combiner = texts[0].model, texts[0].model.combiner
    claims = members.read_on(texts, slice(len(model.members), None)) if model.claimants else {}
    found = {one: told for one, own in claims.items() if (told := claim_drawn(own, chance)) is not None}
    asked = {one: i for one, i in zip(texts, drawn, strict=True) if one not in found}
    read = members.read_on([*asked], {one: slice(i, i + 1) for one, i in asked.items()}) if asked else {}
    for one in texts:
        one.check()
    if asked:
        states = [read[one][0] for one in asked]
        ours = quick.of_drawn(combiner.heads, states, [*asked.values()], combiner.support, combiner.v)
        if not found:
            return ours
        found |= zip(asked, ours, strict=True)
    return torch.stack([found[one].to(combiner.heads[0].device, torch.float64) for one in texts])
