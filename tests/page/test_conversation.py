"""What the page's conversation asks for where it is too long for a context."""

from __future__ import annotations

import asyncio

import pytest

from softmeet.server.errors import RequestError


class Serving:
    """It has room for so many messages."""

    def __init__(self, room, code="context_length_exceeded"):
        self.room, self.code, self.asked = room, code, 0

    async def prepare(self, request):
        self.asked += 1
        if len(request.messages) > self.room:
            raise RequestError("too long", code=self.code)
        return [one.content for one in request.messages]


@pytest.mark.parametrize("turns", [1, 3, 5, 8, 2001])
@pytest.mark.parametrize("room", [1, 2, 4, 7, 3000])
@pytest.mark.parametrize("system", [0, 1])
def test_as_few_first_turns_are_left_out_as_need_be_and_others_come_between(turns, room, system):
    told = [{"role": "user" if k % 2 == 0 else "assistant", "content": str(k)} for k in range(turns)]
    every, serving, others = [{"role": "system", "content": "s"}] * system + told, Serving(room + system), 0

    async def beside():
        nonlocal others
        while True:
            others += 1
            await asyncio.sleep(0)

    async def asked():
        from softmeet.server.ui_chat import _prepared as prepared

        task = asyncio.ensure_future(beside())
        try:
            return await prepared(serving, {"model": "m"}, every)
        finally:
            task.cancel()

    pairs = next((k for k in range((turns + 1) // 2) if turns - 2 * k <= room), None)
    if pairs is None:
        with pytest.raises(RequestError, match="too long"):
            asyncio.run(asked())
    else:
        assert asyncio.run(asked()) == ["s"] * system + [str(k) for k in range(2 * pairs, turns)]
    assert serving.asked <= 2 + turns.bit_length()
    assert others >= serving.asked - 1


def test_what_else_is_wrong_is_told_at_once():
    from softmeet.server.ui_chat import _prepared

    serving = Serving(0, "other")
    with pytest.raises(RequestError):
        asyncio.run(_prepared(serving, {"model": "m"}, [{"role": "user", "content": "a"}] * 5))
    assert serving.asked == 1
