"""The gate ``unsure``: which members read where the first one is unsure, and the others catch up.

Each member after the first may be behind by any number of tokens. If the first member is unsure at a token, the others
read all tokens that they have not read, each member in one call for all texts that need it in this step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from softmeet.engine.ask import C, Hidden, Members
from softmeet.engine.continuation import Continuation
from softmeet.engine.deferral import Deferral
from softmeet.rules.gates import Unsure, unsure_of
from softmeet.rules.settings import Settings


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
