"""Turns of large bodies: nobody else goes on while one is parsed, so one comes after another, with time between."""

from __future__ import annotations

import asyncio
from bisect import insort
from itertools import count

from softmeet.server.errors import BusyError

# Bodies of more bytes take turns, each for as long as it takes at so many bytes a second.
LARGE, _RATE = 1 << 15, 2e6
# How many wait at most.
_MOST = 64


class LargeBodies:
    """The large bodies that wait for their turn, the shortest first."""

    def __init__(self) -> None:
        self._waiting, self._taken = list[tuple[int, int, asyncio.Future[bool]]](), False
        self._numbers = count()

    async def turn(self, size: int) -> bool:
        """Wait until a body of so many bytes may be parsed, then return True; cancelled, it gives its place up.

        Raises:
            BusyError: if too many wait, and it is the longest of them.
        """
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        one = size, next(self._numbers), turn
        insort(self._waiting, one)
        if len(self._waiting) > _MOST:
            *_, last = self._waiting.pop()
            last.set_exception(BusyError(f"expected at most {_MOST} large bodies at once: ask again later, or less"))
        self._begin()
        try:
            return await turn
        finally:
            if one in self._waiting:
                self._waiting.remove(one)

    def _begin(self) -> None:
        while self._waiting and not self._taken:
            size, _, first = self._waiting.pop(0)
            if not first.done():  # else its client has just left
                self._taken = True
                first.set_result(True)
                asyncio.get_running_loop().call_later(size / _RATE, self._end)

    def _end(self) -> None:
        self._taken = False
        self._begin()
