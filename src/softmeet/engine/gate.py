"""The gate ``unsure``: which members read where the first one is unsure, and the others catch up.

Each member after the first may be behind by any number of tokens. If the first member is unsure at a token, the others
read all tokens that they have not read, each member in one call for all texts that need it in this step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.engine.ask import Hidden, Members
from softmeet.engine.continuation import Continuation
from softmeet.engine.deferral import Deferral
from softmeet.rules.gates import Unsure

OTHERS = slice(1, None)


def ask(
    texts: Sequence[Continuation],
    hidden: Sequence[Hidden],
    gate: Unsure,
    members: Members,
    *,
    pause: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Hidden]:
    """Return what every member predicts behind the newest token of texts, where the gate is open.

    Where it is closed the members after the first do not read, and zeros stand for their hidden states. Each text's
    ``asked`` (whether they read) and ``spent`` (its share of the seconds that this takes) are set.

    Args:
        texts: those of one ensemble.
        hidden: for each of them, a list of the first member's last hidden state at its newest token, (1, d_1).
        gate: the gate.
        members: those who read.
        pause: called between the pieces of what is read.
        clock: returns a time in seconds.

    Returns:
        for each text a list of one tensor (1, d_i) per member; as given of one that has ``failures``.
    """
    # Nobody asks about a text that the first member cannot read: whoever wrote it ends it.
    well = {one: own[0] for one, own in zip(texts, hidden, strict=True) if not one.failures}
    if not well:
        return list(hidden)
    asked = texts[0].model.combiner.deferral(gate, torch.cat(list(well.values())))
    for k, one in enumerate(well):
        one.asked, one.spent = asked.take(slice(k, k + 1)), 0.0
    is_open = [one for one, opened in zip(well, asked.rows.tolist(), strict=True) if opened]
    started = clock()
    caught_up = members.read_on(is_open, OTHERS, pause=pause) if is_open else {}
    for one in is_open:
        one.spent = (clock() - started) / len(is_open)
    found = []
    for one, own in zip(texts, hidden, strict=True):
        if one not in well:
            found.append(list(own))
            continue
        others = [states[-1:] for states in caught_up.get(one, ())] or unread(one, own[0])
        found.append([*own, *others])
    return found


def joined(texts: Sequence[Continuation]) -> Deferral | None:
    """Join the ``asked`` of texts of one ensemble: for which of them all members read, not the first alone.

    Args:
        texts: B texts, each with ``asked`` as :func:`ask` sets it.

    Returns:
        a deferral whose mask, (B,), is True for texts of which all members read, with the first member's logits,
        (B, v), if every text has them; None without a gate ``unsure``.
    """
    found = [one.asked for one in texts if one.asked is not None]
    if not found:
        return None
    logits = [one.logits for one in found if one.logits is not None]
    return Deferral(torch.cat([one.rows for one in found]), torch.cat(logits) if len(logits) == len(found) else None)


def unread(text: Continuation, like: Float[Tensor, "t d"]) -> Hidden:
    """Return zeros, (t, d_i), in place of the hidden states of each member but the first, where they are not used.

    Args:
        text: whose members they are.
        like: the first member's hidden states, (t, d); they give t, dtype and device.
    """
    return [like.new_zeros(len(like), head.d) for head in text.model.combiner.heads[1:]]
