"""Prompts whose clients leave are read no further, within a call of the model, too, and long ones are logged."""

import threading
import time

import batches
import pytest

from softmeet.readers.reader import Reader
from softmeet.server.sequences import Finished
from softmeet.suspended import Control, StoppedError, by_turns, control


@pytest.fixture
def endless(monkeypatch):
    """A function that has a reader read prompts of ten tokens or more until it is stopped, as llama.cpp would."""

    def change(reader: Reader, told=None):
        read, begun = reader.read, threading.Event()

        def endlessly(asked):
            if max(len(one.symbols) for one in asked) < 10:
                return (yield from read(asked))
            if told is not None:
                yield told
                return (yield from read(asked))
            begun.set()
            for _ in range(2000):
                if control().stopped:
                    raise StoppedError
                time.sleep(0.01)
            pytest.fail("nobody stopped it")

        monkeypatch.setattr(reader, "read", endlessly)
        return begun

    return change


@pytest.fixture(scope="module")
def model():
    return batches.ensemble_of(batches.MEMBERS[:2])


def test_a_prompt_is_read_no_further_once_who_asked_has_left(model, serve, endless):
    batcher = serve(model)
    begun = endless(next(iter(batcher.readers.values())))
    (long, _), (short, told) = (batches.sequence(model, batches.prompt(k, length)) for k, length in enumerate((20, 5)))
    batcher.submit([long])
    assert begun.wait(60)
    batcher.submit([short])
    long.cancel()
    assert isinstance(told.all()[-1], Finished)
    assert long.done


def test_prompts_that_are_read_together_are_read_until_all_have_left(model):
    every, own = [batches.sequence(model, batches.prompt(k, 5))[0] for k in range(2)], Control()
    for s in every:
        s.reading = every, own
    every[0].cancel()
    assert not own.stopped
    every[1].cancel()
    assert own.stopped


def test_the_log_says_how_far_a_long_prompt_is_read(model, serve, endless, monkeypatch, caplog):
    monkeypatch.setattr("softmeet.server.batcher._EVERY", 0.0)
    batcher = serve(model)
    endless(next(iter(batcher.readers.values())), (1024, 4000))
    with caplog.at_level("INFO", "softmeet.access"):
        s, told = batches.sequence(model, batches.prompt(1, 20))
        batcher.submit([s])
        told.all()
    assert [r.getMessage() for r in caplog.records if r.name == "softmeet.access"] == [
        "reading 1,024 of 4,000 tokens of 1 prompts, by all members"
    ]


def test_how_much_is_read_is_told_of_all_in_sum():
    def work(total):
        for done in range(0, total, 4):
            yield done, total

    heard = []
    with Control(lambda done, total: heard.append((done, total))).over():
        by_turns([work(8), iter(()), work(40)])
    assert heard == sorted(heard)
    assert (heard[0], heard[-1], {total for _, total in heard}) == ((0, 48), (48, 48), {48})


def test_works_that_read_one_after_the_other_never_go_back():
    """As members over bytes, each of which tells what it reads, and leaves off for nobody."""

    def work(total):
        for done in range(0, total, 4):
            control().hear(done, total)
        return total
        yield

    heard = []
    with Control(lambda done, total: heard.append(done / total)).over():
        assert by_turns([work(8), work(12)]) == [8, 12]
    assert heard == sorted(heard) == [0, 0.25, 0.4, 0.6, 0.8, 1]
