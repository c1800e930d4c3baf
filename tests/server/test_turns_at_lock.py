"""How threads take turns at Python's lock, and how large bodies do."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest

from softmeet.server import security
from softmeet.server.security import Guard, Protection
from softmeet.server.turns_at_lock import TurnsAtLock


def test_turns_are_short_beside_few_sequences_and_while_a_text_is_written():
    before, usual = sys.getswitchinterval(), 5e-3
    sys.setswitchinterval(usual)
    turns = TurnsAtLock()
    seen = [sys.getswitchinterval()]
    try:
        for rows in (0, 2, 40):
            turns.beside(rows, "batcher")
            seen.append(sys.getswitchinterval())
        assert float(asyncio.run(turns.written(lambda: str(sys.getswitchinterval())))) == pytest.approx(1e-4)
        seen.append(sys.getswitchinterval())
        turns.beside(1, "batcher")
        asyncio.run(turns.written(lambda: ""))
        seen.append(sys.getswitchinterval())
        turns.beside(0, "batcher")
        seen.append(sys.getswitchinterval())
    finally:
        sys.setswitchinterval(before)
    assert seen == pytest.approx([usual, usual, 1e-4, usual, usual, 1e-4, usual])


def test_large_bodies_are_read_one_after_another(monkeypatch):
    monkeypatch.setattr(security, "_RATE", 1e6)
    guard, begun = Guard(None, Protection()), []

    async def read(size):
        await guard._take_turns(size)
        begun.append((size, time.monotonic()))

    async def all_of_them():
        await asyncio.gather(*(read(size) for size in (400_000, 400_000, 1_000)))

    asyncio.run(all_of_them())
    times = [moment for _, moment in sorted(begun, key=lambda one: one[1])]
    assert begun[-1][0] == 400_000
    assert times[-1] - times[0] >= 0.39
    assert [size for size, moment in begun if moment - times[0] < 0.2 and size == 1_000] == [1_000]
