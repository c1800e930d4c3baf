"""How threads take turns at Python's lock."""

import asyncio
import sys

import pytest

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
