"""Members at the same time: as told, or as measured, each in its share of torch's threads."""

import signal
import threading
import time

import pytest
import torch

from softmeet.engine.together import Together


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def at_once(function):
    """Work that is done without being left."""

    def work(item):
        yield from ()
        return function(item)

    return work


def waiting(seconds):
    """A function that takes so long, and tells its thread, and torch's number of threads there."""

    def function(item):
        time.sleep(seconds)
        return item, threading.get_ident(), torch.get_num_threads()

    return function


def test_threads_share_torchs(four_threads):
    both = Together(2, True).map(at_once(waiting(0.2)), ["a", "b"])
    assert [item for item, _, _ in both] == ["a", "b"]
    assert len({thread for _, thread, _ in both} | {threading.get_ident()}) == 3
    assert [threads for _, _, threads in both] == [2, 2]
    assert torch.get_num_threads() == 4
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [4], "other threads have all of them"


def test_ctrl_c_comes_when_all_work_has_ended(four_threads):
    ended = []

    def function(item):
        time.sleep(0.2)
        if item == "a":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)
        ended.append(item)

    # In the background of a shell, signals of the terminal are ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Together(2, True).map(at_once(function), ["a", "b"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(ended) == ["a", "b"]


def test_what_is_faster_is_kept_for_each_size(four_threads):
    together = Together(2, "auto")

    lock = threading.Lock()

    @at_once
    def work(item):
        with lock:
            time.sleep(0.002)
        return threading.get_ident()

    def used(function, size):
        """The numbers of threads of calls after all have been tried."""
        calls = [len(set(together.measured(function, [1, 2], size))) for _ in range(20)]
        assert set(calls[:12]) == {1, 2}
        return set(calls[12:])

    # Where one waits for the other, threads save nothing.
    assert used(work, 1) == {1}
    assert used(at_once(lambda item: waiting(0.01)(item)[1]), 8) == {2}
    assert set(together.measured(work, [1, 2], 9)) != {threading.get_ident()}, "9 counts as 8"
    assert set(together.measured(work, [3, 4], 8)) == {threading.get_ident()}, "others are measured by themselves"
    assert set(together.map(work, [1, 2])) == {threading.get_ident()}


def test_an_error_of_a_member_is_raised(four_threads):
    together, done = Together(2, True), []

    @at_once
    def work(item):
        time.sleep(0.2 * item)
        done.append(1 // item)

    with pytest.raises(ZeroDivisionError):
        together.map(work, [0, 1])
    assert done == [1], "nobody works on when the caller goes on"
    assert together.map(at_once(lambda item: 1 // item), [1, 1]) == [1, 1]
