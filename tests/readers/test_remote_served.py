"""A member behind a server that hangs, beside others in one server: it holds up nobody, and no end."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import http, running, serving_of
from test_remote import member, speaking, stub

from softmeet import Ensemble


@pytest.mark.parametrize("when", ["at the prompt", "between tokens"])
def test_a_member_whose_server_hangs_holds_up_nobody(when, folders):
    hangs, goes_on, asked = threading.Event(), threading.Event(), threading.Semaphore(0)
    count = [0]

    def change(path, found):
        if hangs.is_set():
            count[0] += 1
            if when == "at the prompt" or count[0] > 2:
                asked.release()
                goes_on.wait(120)
        return found

    alone = Ensemble.from_pretrained(folders[:1], "logit-mean")
    with stub(speaking("vllm", alone, change)) as url, ThreadPoolExecutor() as pool:
        both = Ensemble.from_pretrained([member(url, folders), f"{folders[1]}+name=local"], "prob-mean")
        serving = serving_of({"remote": both, "local": alone})
        with running(serving) as served:
            hangs.set()
            body = {"prompt": "ab", "max_tokens": 8, "seed": 1, "logit_bias": {"0": -100}}
            late = pool.submit(http.post, f"{served}/v1/completions", json=body | {"model": "remote"})
            assert asked.acquire(timeout=60)
            for _ in range(3):
                start = time.monotonic()
                answer = http.post(f"{served}/v1/completions", json=body | {"model": "local"})
                assert answer.json()["usage"]["completion_tokens"] == 8
                assert time.monotonic() - start < 30
            assert not late.done()
            serving.batcher.close(0)
            assert late.result(60).json()["error"]["code"] == "shutting_down"
            for reader in serving.batcher.readers.values():
                reader.abort()
            serving.batcher.join(60)
            assert not serving.batcher.is_alive()
        goes_on.set()


def test_a_member_that_fails_at_the_start_keeps_nobody_from_being_served(folders):
    failing = []

    def change(path, found):
        return (400, "application/json", "{}") if failing and "completions" in path else found

    alone = Ensemble.from_pretrained(folders[:1], "logit-mean")
    with stub(speaking("vllm", alone, change)) as url:
        both = Ensemble.from_pretrained([member(url, folders), f"{folders[1]}+name=local"], "prob-mean")
        failing.append(True)
        with running(serving_of({"remote": both, "local": alone})) as served:
            status = {
                name: http.post(f"{served}/v1/completions", json={"prompt": "a", "max_tokens": 1, "model": name})
                for name in ("remote", "local")
            }
    assert {name: answer.status_code for name, answer in status.items()} == {"remote": 500, "local": 200}
    assert "a member failed" in status["remote"].text
