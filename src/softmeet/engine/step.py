"""One step of texts: who reads what of them, and what the rule makes of their newest places.

Usually every member reads every token. Under the gate ``unsure`` the first does, and where it is unsure at a token the
others read all tokens that they have not read, each member in one call for all texts that need it in this step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.engine.ask import C, Hidden, Members
from softmeet.engine.claims import claim_drawn
from softmeet.engine.combine import Combined, Deferral
from softmeet.engine.continuation import Continuation, Dropped
from softmeet.rules.gates import Unsure, unsure_of
from softmeet.rules.problem import TokensBefore
from softmeet.rules.settings import Settings

_log = logging.getLogger("softmeet")


def read(
    texts: Sequence[C],
    members: Members,
    settings: Settings,
    *,
    every: bool = False,
    pause: Callable[[], None] | None = None,
    at: Callable[[C, int], Int[Tensor, " t"]] | None = None,
) -> dict[C, Hidden]:
    """Have members read what they have not read of texts: all of them, or under the gate those that are asked.

    Args:
        texts: those of one ensemble; why a member cannot read one is added to its ``failures``.
        members: those who read.
        settings: those by which they are combined, with the gate.
        every: as of :meth:`Members.read_on`.
        pause: called between the pieces of what is read.
        at: returns at which of so many last places of a text predictions are wanted, counted from the end, from -1;
            None for all.

    Returns:
        for each text what each member predicts, as :meth:`Members.read_on` has it; zeros of one that is not asked.
    """
    gate = unsure_of(settings.gate)
    found = members.read_on(texts, slice(None if gate is None else 1), every=every, pause=pause)
    wanted = None if at is None else {one: at(one, min(map(len, own), default=0)) for one, own in found.items()}
    if gate is not None:
        return ask(found, gate, members, every=every, pause=pause, at=wanted)
    for one in texts:
        one.asked, one.spent = None, 0.0
    return found if wanted is None else {one: _at(own, wanted[one]) for one, own in found.items()}


def ask(
    found: dict[C, Hidden],
    gate: Unsure,
    members: Members,
    *,
    every: bool = False,
    pause: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    at: dict[C, Int[Tensor, " t"]] | None = None,
) -> dict[C, Hidden]:
    """Return what every member predicts for texts, where the gate is open at one of their places.

    Where it is closed the members after the first do not read, and zeros stand for their hidden states. Each text's
    ``asked`` (at which places the gate is open) and ``spent`` (its share of the seconds that this takes) are set.

    Args:
        found: for each text of one ensemble, a list of the first member's last hidden states at t places, (t, d_1).
        gate: the gate.
        members: those who read.
        every: whether the places are all that members have not read, in place of the newest alone.
        pause: called between the pieces of what is read.
        clock: returns a time in seconds.
        at: for each text which of the places are wanted, counted from the end, from -1; None for all.

    Returns:
        for each text a list of one tensor (t, d_i) per member; as given of one that has ``failures``.
    """
    # Nobody asks about a text that the first member cannot read: whoever wrote it ends it.
    well = {one: (own if at is None else _at(own, at[one]))[0] for one, own in found.items() if not one.failures}
    if not well:
        return found
    model, start = next(iter(well)).model, 0
    deferral = model.combiner.deferral(gate, torch.cat(list(well.values())))
    for one, own in well.items():
        one.asked, one.spent = deferral.take(slice(start, start + len(own))), 0.0
        start += len(own)
    is_open = [one for one in well if one.asked is not None and bool(one.asked.rows.any())]
    started = clock()
    others = slice(1, len(model.members))
    caught_up = members.read_on(is_open, others, every=every, pause=pause) if is_open else {}
    for one in is_open:
        one.spent = (clock() - started) / len(is_open)
    # Whatever the gate says, readers that claim are asked.
    claiming = slice(others.stop, None)
    claims = members.read_on(list(well), claiming, every=every, pause=pause) if model.claimants else {}
    heads = model.combiner.heads[1:]
    told = dict(found)
    for one, own in well.items():
        behind = [*caught_up.get(one, ()), *claims.get(one, ())]
        newest = [states[-len(own) :] for states in behind] if at is None else _at(behind, at[one])
        closed = [] if one in caught_up else [own.new_zeros(len(own), head.d) for head in heads]
        told[one] = [own, *closed, *newest]
    return told


def _at(hidden: Hidden, places: Int[Tensor, " t"]) -> Hidden:
    return [states[places.to(states.device)] for states in hidden]


def joined(texts: Sequence[Continuation]) -> Deferral | None:
    """Join the ``asked`` of texts of one ensemble: for which of them all members read, not the first alone.

    Args:
        texts: B texts, each with ``asked`` as :func:`ask` sets it.

    Returns:
        a deferral whose mask, (B,), is True for texts of which all members read, with the first member's logits,
        (B, v), if every text has them; None without a gate ``unsure``.
    """
    if texts[0].asked is None:
        return None
    found = [one.asked for one in texts if one.asked is not None]
    logits = [one.logits for one in found if one.logits is not None]
    return Deferral(torch.cat([one.rows for one in found]), torch.cat(logits) if len(logits) == len(found) else None)


def combined(
    texts: Sequence[Continuation], hidden: Sequence[Hidden], settings: Settings, *, quickly: bool
) -> Iterator[Combined]:
    """Combine the members at the newest place of each text, in chunks of texts that bound memory.

    Args:
        texts: B texts of one ensemble.
        hidden: for each text, each member's last hidden states there, (1, d_i).
        settings: those by which they are combined, from :meth:`Settings.for_members`.
        quickly: as of :meth:`Combiner.combined`.

    Raises:
        SoftmeetError: as :meth:`Combiner.combine_rows`.
    """
    model = texts[0].model
    stacked = [torch.cat(member) for member in zip(*hidden, strict=True)]

    def before() -> TokensBefore | None:
        return TokensBefore.of(torch.tensor([one.tokens[-1] for one in texts]), model.tokenizer)

    return model.combiner.combined(stacked, settings, joined(texts), before, quickly=quickly, proved=False)


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
        ours = combiner.of_drawn(states, [*asked.values()])
        if not found:
            return ours
        found |= zip(asked, ours, strict=True)
    return torch.stack([found[one].to(combiner.device, torch.float64) for one in texts])


def end_full(texts: Sequence[Dropped], ours: Float[Tensor, "B v"]) -> None:
    """Put, in place, an end behind texts that have to end, as the context of a member is full."""
    for k, one in enumerate(texts):
        if one.is_full:
            ours[k] = _ended(one, ours[k])


def _ended(text: Dropped, like: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
    """Return log-probabilities in nats, (v,), by which an end of a text is all that can follow; say so in the log once.

    Args:
        text: one that has to end for all members, as the context of one is full.
        like: gives v, dtype and device.
    """
    if not text.noted:
        text.noted = True
        _log.warning("a text ends because the context of %s is full", ", ".join(text.full_members))
    ends = sorted(text.readers[0].alphabet.ends)
    found = torch.full_like(like, -torch.inf)
    found[ends] = -math.log(len(ends))
    return found


def require_read(texts: Sequence[Dropped]) -> None:
    """Raise the error of a text that a member cannot read."""
    for one in texts:
        one.check()
