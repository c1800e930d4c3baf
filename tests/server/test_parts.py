"""The parts of a stream: over bytes what comes within a twentieth of a second is one."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from serving import http, running, serving_of

from softmeet import Ensemble
from softmeet.errors import SoftmeetError
from softmeet.server import answer, app
from softmeet.server.answer import AnswerStream, ChoiceDelta


class Stream(AnswerStream):
    """Deltas at given times of a clock."""

    def __init__(self, given, clock, fails=False):
        self._given, self._clock, self._fails = given, clock, fails

    async def deltas(self):
        for at, index, text, finish in self._given:
            self._clock[0] = at
            yield ChoiceDelta(index, text, [text], finish=finish)
        if self._fails:
            raise SoftmeetError("lost")


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(answer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def parts(stream, seconds, found):
    async def run():
        async for part in stream.parts(seconds):
            found.append((part.index, part.text, part.tokens, part.finish))

    asyncio.run(run())


GIVEN = [(0.0, 0, "a", None), (0.01, 1, "x", None), (0.02, 0, "b", None), (0.06, 0, "c", None), (0.07, 0, "d", "stop"),
         (0.08, 1, "y", "length")]  # fmt: skip


def test_what_comes_soon_is_joined_and_an_end_waits_for_nothing(clock):
    found = []
    parts(Stream(GIVEN, clock), 0.05, found)
    assert found == [
        (0, "a", ["a"], None), (1, "x", ["x"], None), (0, "bc", ["b", "c"], None), (0, "d", ["d"], "stop"),
        (1, "y", ["y"], "length"),
    ]  # fmt: skip
    each = []
    parts(Stream(GIVEN, clock), 0.0, each)
    assert [text for _, text, _, _ in each] == ["a", "x", "b", "c", "d", "y"]


def test_what_was_held_comes_before_an_error(clock):
    found = []
    with pytest.raises(SoftmeetError, match="lost"):
        parts(Stream(GIVEN[:3], clock, fails=True), 0.05, found)
    assert [text for _, text, _, _ in found] == ["a", "x", "b"]


def test_a_stream_over_bytes_joins_what_comes_soon(monkeypatch):
    monkeypatch.setattr(app, "_PAUSE", 1e9)
    given = {"model": "default", "prompt": "And the king", "max_tokens": 12, "stream": True, "temperature": 0}
    with running(serving_of({"default": Ensemble.from_pretrained("mixed")})) as url:
        sent = http.post(f"{url}/v1/completions", json=given).text.split("\n")
        whole = http.post(f"{url}/v1/completions", json=given | {"stream": False}).json()["choices"][0]["text"]
    lines = [line.removeprefix("data: ") for line in sent if line.startswith("data: ")]
    texts = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(texts) == whole
    assert len(texts) == 2
