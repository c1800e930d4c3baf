"""Prompts while they are read: whoever leaves stops it, and the log says how far a long one is."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Several

from softmeet.engine.ask import Hidden, Members
from softmeet.server.sequences import Sequence
from softmeet.server.tasks import Task
from softmeet.suspended import Control

# By its name, as what stands before the server is loaded without members.
_log = logging.getLogger("softmeet.access")
# Seconds between two lines of the log.
_EVERY = 5.0


def read(members: Members, group: Several[Sequence], task: Task) -> dict[Sequence, Hidden]:
    """Return what members predict behind the prompts of sequences of one combination, and of all of a scored prompt.

    Args:
        members: those of all ensembles.
        group: the sequences, at least one.
        task: is paused where the reading may be left for a while.

    Raises:
        SoftmeetError: if a prompt cannot be read.
        StoppedError: if all sequences are cancelled meanwhile.
    """
    told = time.monotonic()

    def hear(done: int, total: int) -> None:
        nonlocal told
        if done < total and (now := time.monotonic()) > told + _EVERY:
            told = now
            _log.info("reading %s of %s tokens of %d prompts, by all members", f"{done:,}", f"{total:,}", len(group))

    own = Control(hear)
    for s in group:
        s.reading = group, own
    if all(s.cancelled for s in group):  # before they could know of the control
        own.stop()
    with own.over():
        return members.read_on(group, group[0].batched, every=group[0].request.score_prompt, pause=task.pause)
