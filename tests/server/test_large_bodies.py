"""How large bodies take turns, and what becomes of those whose client leaves."""

import asyncio
import time
from itertools import pairwise

import pytest

from softmeet.server import security
from softmeet.server.security import LARGE, Guard, LargeBodies, Protection

LONG = 8 * LARGE


@pytest.fixture
def rate(monkeypatch):
    monkeypatch.setattr(security, "_RATE", 1e6)
    return 1e6


async def asked(guard, size, reached, *, stays):
    """Send a body of so many bytes, and leave or wait; what is answered goes to ``reached``."""
    told = [{"type": "http.request", "body": b'"' + b"a" * (size - 2) + b'"', "more_body": False}]

    async def receive():
        if told:
            return told.pop()
        if stays:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
             "headers": [(b"host", b"a"), (b"content-type", b"application/json")]}  # fmt: skip

    async def send(message):
        reached.append(message)

    await guard(scope, receive, send)


def test_large_bodies_come_one_after_another_the_shortest_first(rate):
    begun = []

    async def read(bodies, size):
        await bodies.turn(size)
        begun.append((size, time.monotonic()))

    async def all_of_them():
        bodies = LargeBodies()
        await asyncio.gather(*(read(bodies, size) for size in (LONG, LONG + 2, LONG + 1)))

    asyncio.run(all_of_them())
    assert [size for size, _ in begun] == [LONG, LONG + 1, LONG + 2]
    for (size, moment), (_, later) in pairwise(begun):
        assert later - moment >= 0.99 * size / rate


def test_too_many_large_bodies_are_refused_the_longest_first(rate):
    async def all_of_them():
        bodies = LargeBodies()
        sizes = [LONG, *range(LONG + 1000, LONG + 1000 + security._MOST), LARGE + 1]
        tasks = [asyncio.ensure_future(bodies.turn(size)) for size in sizes]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        refused = [size for size, task in zip(sizes, tasks, strict=True) if task.done() and task.exception()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return sizes, refused, bodies._waiting

    sizes, refused, left = asyncio.run(all_of_them())
    assert refused == [sizes[-2]]
    assert left == []


def test_a_client_that_leaves_gives_its_turn_up_and_its_body_is_forgotten(rate):
    reached = []

    async def app(scope, receive, send):
        reached.append(len((await receive())["body"]))

    async def all_of_them():
        guard = Guard(app, Protection())
        first = asyncio.ensure_future(asked(guard, 2 * LONG, reached, stays=True))
        await asyncio.sleep(0.01)
        start = time.monotonic()
        gone = [asyncio.ensure_future(asked(guard, LONG - 1, reached, stays=False)) for _ in range(50)]
        last = asyncio.ensure_future(asked(guard, LONG, reached, stays=True))
        await asyncio.gather(first, *gone, last)
        return time.monotonic() - start

    seconds = asyncio.run(all_of_them())
    assert reached == [2 * LONG, LONG]
    assert seconds < 10 * LONG / rate


@pytest.mark.parametrize("stays", [True, False])
def test_what_a_client_sent_that_has_left_is_not_even_parsed(stays):
    reached = []

    async def app(scope, receive, send):
        reached.append(len((await receive())["body"]))

    asyncio.run(asked(Guard(app, Protection()), 100, reached, stays=stays))
    assert reached == ([100] if stays else [])
