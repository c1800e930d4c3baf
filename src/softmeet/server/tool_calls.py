"""Calls of functions in the text of an answer, as Hermes and Qwen models write them: ``<tool_call>…</tool_call>``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function: its name, and its arguments by their names."""

    name: str
    arguments: dict[str, Any]


class Calls:
    """The calls in a text that comes piece by piece.

    What stands before the first call is text. Between calls and behind them there is none, but what stands between the
    tags and is no call, ``{"name": …, "arguments": {…}}`` as JSON, stays text. The last call needs no end.

    Args:
        most: the most calls; further ones are left out.

    Attributes:
        count: the number of calls so far.

    Example:
        >>> calls = Calls()
        >>> calls.push('Wait. <tool_call>{"name": "now", "arg', last=False)
        ('Wait. ', [])
        >>> calls.push('uments": {}}</tool_call>', last=True)
        ('', [FunctionCall(name='now', arguments={})])
    """

    def __init__(self, most: int = 1 << 30) -> None:
        self._most, self.count, self._held = most, 0, ""

    def push(self, piece: str, *, last: bool) -> tuple[str, list[FunctionCall]]:
        """Add a piece, and return the text and the calls that are certain now; with the ``last`` one that is all."""
        said, found = "", list[FunctionCall]()
        self._held += piece
        while self._held:
            free, opened, rest = self._held.partition(_OPEN)
            body, closed, behind = rest.partition(_CLOSE)
            kept = 0 if opened or last else overlap(free, _OPEN)
            said += "" if self.count else free[: len(free) - kept]
            self._held = self._held[len(free) - kept :]
            if not opened or not (closed or last):
                break
            if call := _call(body):
                self.count += 1
                found += [call] if self.count <= self._most else []
            else:
                said += opened + body + closed
            self._held = behind
        return said, found


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)


def _call(body: str) -> FunctionCall | None:
    try:
        found = json.loads(body)
        name, arguments = found["name"], found["arguments"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return FunctionCall(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None
