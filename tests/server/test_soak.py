"""The soak: seconds of the load that `make soak` puts on two servers for an hour, and what it counts as a breach."""

import asyncio

import pytest

from servers import Site
from soak import ASKED, Answer, Soak, requests, soaked


@pytest.mark.slow
def test_seconds_of_the_soak_find_nothing_wrong(monkeypatch):
    """With each seeded request's rule once, and few tokens of it."""
    some = [asked | {"max_tokens": min(asked["max_tokens"], 4)} for asked in requests()[: len(ASKED)]]
    monkeypatch.setattr("soak.requests", lambda families: some)
    soak = asyncio.run(soaked(5, clients=4, kill_every=2, seed=1, reproducible=False, members=[]))
    found = soak.outcomes()
    assert not soak.breaches, soak.breaches
    assert soak.sites[1].kills >= 1
    assert found["right"] >= 10
    assert {kind for kind, _ in soak.seen} >= {"stream", "whole", "malformed", "schemathesis"}


@pytest.fixture
def soak():
    return Soak([Site("steady", [])])


def test_what_may_not_be_is_a_breach(soak):
    wrong = ["hung", "status 500", "ended in silence", "connection error ReadError", "error event"]
    for outcome in ("right", *wrong):
        soak.count("stream", outcome)
    soak.count("whole", "cut by a kill")
    assert soak.breaches == [f"stream: {outcome}" for outcome in wrong]


def test_a_token_that_differs_is_a_breach_of_reproducible_servers_or_where_rounding_does_not_explain_it(soak):
    soak.seen.update({("whole", "right"): 100, ("whole", "differs"): 3})
    soak.judge()
    assert not soak.breaches
    soak.seen["whole", "differs"] = 10
    soak.judge()
    assert soak.breaches == ["10 answers differ, more than rounding explains"]
    strict = Soak(soak.sites, reproducible=True)
    strict.count("stream", "differs")
    assert strict.breaches == ["stream: differs"]


@pytest.mark.parametrize(
    ("mb_a_second", "seconds", "judged"), [(0.05, 1800, True), (0.001, 1800, False), (0.05, 1000, False)]
)
def test_memory_that_grows_after_ten_minutes_is_a_breach(soak, mb_a_second, seconds, judged):
    """It may grow by a twentieth an hour, and as it likes in the first ten minutes, or if it is free."""
    soak.sites[0].memory = [[(t, 400 + min(t, 600) * 0.5 + mb_a_second * t, t) for t in range(0, seconds, 5)]]
    soak.judge()
    assert bool(soak.breaches) == judged
    assert (soak.sites[0].growth() is None) == (seconds < 1200)


def test_an_answer_that_time_ended_is_exempt():
    answer = Answer()
    answer.add({"choices": [{"finish_reason": None, "logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}}]})
    assert not answer.by_time
    last = {"finish_reason": "length", "logprobs": None, "softmeet": {"statuses": {"OPTIMAL": 1, "BUDGET": 1}}}
    answer.add({"choices": [last]})
    assert (answer.tokens, answer.end, answer.by_time) == (["a"], "length", True)
