"""A model behind a server as a member: servers that answer as llama.cpp's and vLLM do, softmeet's own, and bad ones."""

import asyncio
import gc
import json
import logging
import math
import os
import socket
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from commands import run
from serving import http, running, serving_of, wait_until
from transformers import AutoConfig

from softmeet import Ensemble
from softmeet.errors import CheckpointError, InvalidInputError, ReaderError
from softmeet.evaluation.trace import FORMAT
from softmeet.hf import TokenReports
from softmeet.readers import http_host, remote
from softmeet.readers.guarded import GuardedReader
from softmeet.readers.reader import Read, finished
from softmeet.testing import check_reader, random_texts

PROMPT = "And the king"
# What vLLM 0.32 and llama.cpp's server answered, the latter about SmolLM2, to two tokens.
RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text(encoding="utf-8"))
MODEL = "org/model"


@pytest.fixture(scope="module")
def alone(folders):
    """The first member, which is also that of the servers."""
    return Ensemble.from_pretrained(folders[:1], "logit-mean")


@contextmanager
def stub(answer):
    """A server that answers (method, path, body, headers) by what the function returns: (status, kind, content)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _answer(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, kind, content = answer(self.command, self.path, json.loads(body) if body else None, self.headers)
            self.send_response(status)
            self.send_header("content-type", kind)
            if kind == "moved":
                self.send_header("location", content)
                content = ""
            self.send_header("content-length", str(len(content.encode())))
            self.end_headers()
            self.wfile.write(content.encode())

        do_GET = do_POST = _answer  # noqa: N815 - the library's names

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def speaking(protocol, alone, change=lambda path, found: found):
    """What answers as a server of a protocol did when it was recorded, with the members' figures, and ``change``."""
    recorded, model = deepcopy(RECORDED[protocol]), alone.model.members[0]

    def likeliest(text, count):
        with torch.inference_mode():
            best = model(torch.tensor([text])).logits[0, -1].log_softmax(-1).topk(min(count, 64))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def answer(method, path, body, headers):
        if path == "/props" and protocol == "llama.cpp":
            found = recorded[path]
            found["default_generation_settings"]["n_ctx"] = 64
        elif path == "/completion" and protocol == "llama.cpp":
            told = [
                {"id": k, "token": "x", "bytes": [], "logprob": x}
                for k, x in likeliest(body["prompt"], body["n_probs"])
            ]
            found = recorded[path] | {"completion_probabilities": [told[0] | {"top_logprobs": told}]}
        elif path == "/v1/models" and protocol == "vllm":
            found = recorded[path]
            found["data"][0] |= {"id": MODEL, "max_model_len": 64}
        elif path == "/v1/completions" and protocol == "vllm":
            count = 64 if body["logprobs"] == -1 else body["logprobs"]
            assert body["return_tokens_as_token_ids"]
            assert body["max_tokens"] == 1
            told = {f"token_id:{k}": x for k, x in likeliest(body["prompt"], count)}
            found = recorded[path]
            found["choices"][0]["logprobs"]["top_logprobs"] = [told]
        else:
            return 404, "application/json", '{"error": {"message": "no such path"}}'
        found = change(path, found)
        return found if isinstance(found, tuple) else (200, "application/json", json.dumps(found))

    return answer


def member(url, folders, top=None):
    return f"{url}/v1+tokenizer={folders[0]}" + (f"+top={top}" if top else "")


def short_texts(reader):
    """Texts for the laws, short ones, as every prediction is a request."""
    return [text[:length] for text, length in zip(random_texts(reader), (6, 5, 4), strict=False)]


@pytest.mark.parametrize("protocol", ["llama.cpp", "vllm"])
def test_what_servers_tell(protocol, alone, folders):
    with stub(speaking(protocol, alone)) as url:
        for top in ("all", "12"):
            reader = remote.at(f"{url}/v1#{MODEL}", folders[0], top)
            assert (reader.limit, reader.traits.known) == (63, None if top == "all" else 12)
            check_reader(reader, short_texts(reader))
            text = random_texts(reader)[0]
            found = finished(reader.read([Read(reader.open(), text, range(1, len(text) + 1))]))
            with torch.inference_mode():
                expected = alone.model.members[0](torch.tensor([text])).logits[0].log_softmax(-1)
            known = ~found.logits().isneginf()
            assert torch.allclose(found.logits()[known], expected[known], atol=1e-5)
            if top == "12":
                assert (known.sum(-1) == 12).all()
                assert (expected.masked_fill(known, -math.inf).amax(-1) <= found.bounds() + 1e-6).all()
                unseen = expected.exp().masked_fill(known, 0).sum(-1)
                assert torch.allclose(found.dropped.float(), unseen, atol=1e-5)
                row = reader.open()
                finished(reader.read([Read(row, text, ())]))
                told = reader.explain(row, top=3)
                assert [nats for _, nats in told.expected] == pytest.approx(
                    expected[-1].topk(3).values.tolist(), abs=1e-5
                )
                assert told.details["unseen"] == pytest.approx(unseen[-1].item(), abs=1e-5)


def test_softmeets_own_server_gives_the_local_ensembles_texts(alone, folders):
    local = Ensemble.from_pretrained(folders, "prob-mean")
    with running(serving_of({"m": alone})) as url:
        both = Ensemble.from_pretrained([member(url, folders, "all"), folders[1]], "prob-mean")
        for how in ({}, {"do_sample": True, "seed": 3, "temperature": 1.3}):
            assert both.generate(PROMPT, max_new_tokens=8, **how) == local.generate(PROMPT, max_new_tokens=8, **how)
        reader = both.model.members[0].reader
        assert reader.limit == alone.model.config.max_position_embeddings - 1
        check_reader(reader, short_texts(reader))


def test_what_a_partial_member_is_combined_by(alone, folders, caplog):
    with stub(speaking("vllm", alone)) as url:
        names = [member(url, folders, "12"), folders[1]]
        found = Ensemble.from_pretrained(names)
        assert found.model.config.rule == "prob-mean"
        assert f"as {url[7:]}/v1 tells the 12 likeliest tokens alone" in caplog.text
        mixed = found.next_token(PROMPT, top=64)
        exact = Ensemble.from_pretrained(folders, "prob-mean").next_token(PROMPT, top=64)
        left = 1 - sum(p for _, p in Ensemble.from_pretrained(folders[:1]).next_token(PROMPT, top=12).top)
        apart = sum(abs(p - dict(exact.top)[token]) for token, p in mixed.top) / 2
        assert 0 < apart <= left / 2 + 1e-6
        reports = TokenReports(top=3)
        found.generate(PROMPT, max_new_tokens=1, do_sample=False, recorder=reports)
        report = reports.at(0, 5)
        assert report.unseen == pytest.approx([left, 0], abs=1e-5)
        best = Ensemble.from_pretrained(folders[:1]).next_token(PROMPT, top=3).top
        assert [math.exp(x) for _, x in report.member_top[0]] == pytest.approx([p for _, p in best], abs=1e-5)
        for rule in ("logit-mean", "meet", "power-mean"):
            with pytest.raises(InvalidInputError, match=f"{rule[:5]}.* needs the probability of every token"):
                Ensemble.from_pretrained(names, rule)
        with pytest.raises(InvalidInputError, match="the rule logit-mean needs"):
            found.generate(PROMPT, settings=found.model.settings.changed(rule="logit-mean"), max_new_tokens=2)
        with pytest.raises(InvalidInputError, match="softmeet evaluate needs the probability of every token"):
            found.model.require_likelihood("softmeet evaluate")


def test_over_a_union_and_bytes():
    with running(serving_of({"m": Ensemble.from_pretrained("wide/gpt2", "logit-mean")})) as url:
        names = [f"{url}/v1#m+tokenizer=wide/gpt2", "wide/llama"]
        found, local = (
            Ensemble.from_pretrained(some, vocabulary="union:k=10") for some in (names, ["wide/gpt2", "wide/llama"])
        )
        assert found.generate("And the king", max_new_tokens=8) == local.generate("And the king", max_new_tokens=8)
        with pytest.raises(InvalidInputError, match="the rule logit-mean needs the probability of every token"):
            found.model.require(found.model.settings.changed(rule="logit-mean"))
        with pytest.raises(InvalidInputError, match="expected members that tell every token, as over bytes"):
            Ensemble.from_pretrained(names, "prob-mean", vocabulary="bytes")


def test_a_server_over_bytes_is_no_member():
    with (
        running(serving_of({"m": Ensemble.from_pretrained("mixed", "logit-mean")})) as url,
        pytest.raises(CheckpointError, match="mixes over bytes, and tells no tokens: serve members of one tokenizer"),
    ):
        remote.at(f"{url}/v1#m", "mixed/gpt2", None)


def told(kind, value):
    return lambda path, found: (200, kind, value) if "completions" in path else found


def listed(change):
    """Change what is told of tokens, by name."""

    def changed(path, found):
        if "completions" in path:
            place = found["choices"][0]["logprobs"]["top_logprobs"]
            place[0] = change(dict(place[0]))
        return found

    return changed


def model(**fields):
    """Change what is told of the model."""

    def changed(path, found):
        if "models" in path:
            found["data"][0] |= fields
        return found

    return changed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (told("text/html", "<html>"), "answers with text/html in place of JSON: check the address"),
        (told("application/json", "{}"), "answers without log-probabilities"),
        (told("application/json", '{"choices": [{"logprobs": null}]}'), "answers without log-probabilities"),
        (lambda path, found: (401, "application/json", "{}"), "refuses the key: put the right one into .*MEMBER_KEY"),
        (lambda path, found: (400, "application/json", '{"error": {"message": "too long"}}'), "status 400: too long"),
        (lambda path, found: (302, "moved", "/elsewhere"), "sends on to another address, which is not asked"),
        (lambda path, found: {"data": [{"id": "other"}]}, "has no model org/model: it has other"),
        (listed(lambda one: {}), "tells no token"),
        (listed(lambda one: one | {"token_id:64": -9.0}), "tells the token 64, and its tokenizer has 64"),
        (listed(lambda one: {"token_id:1": 0.0, "token_id:2": 0.0}), "whose sum is no probability"),
        (listed(lambda one: {"token_id:1": math.nan}), "whose sum is no probability"),
        (listed(lambda one: {" the": -1.0}), "names tokens by their text"),
        (listed(lambda one: {"A" * 500_000: -0.1}), "names tokens by their text, as A{300},"),
        (listed(lambda one: {"token_id:5": -1.0, "token_id:05": -2.0}), "names tokens by their text, as token_id:05,"),
        (listed(lambda one: {"token_id:٣": -0.1}), "names tokens by their text, as token_id:٣,"),
        (listed(lambda one: {"token_id:" + "9" * 5000: -0.1}), "names tokens by their text"),
        (listed(lambda one: {"token_id:5": "-0.1"}), "tells -0.1 as a log-probability"),
        (listed(lambda one: {"token_id:5": None}), "tells None as a log-probability"),
        (listed(lambda one: {"token_id:5": False}), "tells False as a log-probability"),
        (listed(lambda one: {"token_id:5": [1, 2]}), r"tells \[1, 2\] as a log-probability"),
        (listed(lambda one: {"token_id:5": -(10**400)}), "tells -10{298} as a log-probability"),
        (listed(lambda one: {"token_id:5": -1e308}), r"tells -1e\+308 as a log-probability"),
        (listed(lambda one: {"token_id:5": -math.inf}), "whose sum is no probability"),
        (told("application/json", "[" * 100_000), "answers with JSON that is nested too deep"),
        (told("application/json", '{"a": ' * 100_000), "answers with JSON that is nested too deep"),
        (told("text/\x1b[31mhtml", "<html>"), r"answers with text/\?\[31mhtml in place of JSON"),
        (model(softmeet="str"), "lists no models"),
        (model(softmeet=[1]), "lists no models"),
        (model(id=5), "lists no models"),
        (model(id=["x"]), "lists no models"),
        (lambda path, found: (200, "application/json", "null"), "lists no models"),
        (model(max_model_len=1), "tells 1 as the tokens of the longest text, where 3 or more were expected"),
        (model(max_model_len=0), "tells 0 as the tokens of the longest text"),
        (model(max_model_len=-5), "tells -5 as the tokens of the longest text"),
        (model(max_model_len=True), "tells True as the tokens of the longest text"),
        (model(max_model_len="64"), "tells 64 as the tokens of the longest text"),
        (model(max_model_len=None, softmeet={"context": 2}), "tells 2 as the tokens of the longest text"),
    ],
)
def test_answers_that_are_none(change, why, alone, folders, monkeypatch):
    asked = []
    answer = speaking("vllm", alone, change)
    monkeypatch.setattr(http_host, "_PAUSE", 0.0)
    with stub(lambda *told: asked.append(told[1]) or answer(*told)) as url:
        with pytest.raises(CheckpointError, match=f"cannot load {url}/v1#{MODEL}: its server .*{why}") as caught:
            remote.at(f"{url}/v1#{MODEL}", folders[0], None)
        assert "\n" not in str(caught.value)
    assert "/elsewhere" not in asked


@pytest.mark.parametrize(
    ("one", "why"),
    [({"id": 5}, "tells a token twice"), ({"id": True}, "tells the token True"), ({}, "without log-prob")],
)
def test_tokens_of_llama_cpps_server_that_are_none(one, why, alone, folders):
    def change(path, found):
        if path == "/completion":
            first = {"id": 5, "logprob": -1.0}
            found["completion_probabilities"][0]["top_logprobs"] = [first, one and first | one]
        return found

    with stub(speaking("llama.cpp", alone, change)) as url, pytest.raises(CheckpointError, match=why):
        remote.at(url, folders[0], None)


def test_addresses_that_are_none(folders, monkeypatch):
    monkeypatch.setattr(http_host, "_PAUSE", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(CheckpointError, match=r"does not answer .*: start the server, or check the address"):
        remote.at(url, folders[0], None)
    said = r"without a name and a key, .* got http://host/v1: put the key"
    with pytest.raises(InvalidInputError, match=said) as caught:
        remote.at("http://me:secret@host/v1", folders[0], None)
    assert "secret" not in str(caught.value)
    for wrong in ("http://", "http:///v1", "http://host:port/v1", "http://host/v1?key=1"):
        with pytest.raises(InvalidInputError, match=r"expected (an|the) address"):
            remote.at(wrong, folders[0], None)
    for behind, said in (
        ("", r"put \+tokenizer=NAME behind it"),
        (f"+tokenizer={folders[0]}+top=few", r"expected a number of tokens or all, got \+top=few"),
        ("+dtype=bfloat16", "got dtype: leave it out"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            Ensemble.from_pretrained(f"{url}#m{behind}")


@pytest.mark.parametrize("protocol", ["llama.cpp", "vllm"])
def test_an_answer_is_no_longer_than_what_is_asked_for_may_be(protocol, alone, folders, monkeypatch):
    """While a long one is read, no other ensemble goes on."""
    monkeypatch.setattr(http_host, "_MOST", 4096)
    filled = []

    def change(path, found):
        return found | {"more": "x" * 9000} if filled and "completion" in path else found

    with stub(speaking(protocol, alone, change)) as url:
        few, every = (Ensemble.from_pretrained([member(url, folders, top)], "prob-mean") for top in (1, "all"))
        filled.append(True)
        with pytest.raises(ReaderError, match=r"answers with more than [0-9,]+ bytes"):
            few.generate("a", max_new_tokens=1, use_cache=False)
        assert every.generate("a", max_new_tokens=1, use_cache=False)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_long_answer_without_an_end_leaves_no_socket_open(monkeypatch):
    monkeypatch.setattr(http_host, "_MOST", 10)
    with endless(BEGUN + b"connection: close\r\n\r\n", b" " * 100) as url:
        with pytest.raises(http_host.HostError, match="answers with more than"):
            http_host.Host(url).get("/models")
        gc.collect()


@contextmanager
def endless(begin, drop, pause=0.02):
    """The address of a server that says ``begin`` to whoever connects, and ``drop`` again and again, to no end."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:

        def speak(connection):
            with connection, suppress(OSError):
                connection.settimeout(10)
                connection.sendall(begin)
                while drop is not None and not over.is_set():
                    connection.sendall(drop)
                    time.sleep(pause)
                connection.recv(1)
                connection.recv(1 << 20)
                connection.recv(1)

        def accept():
            with suppress(OSError):
                while True:
                    pool.submit(speak, server.accept()[0])

        pool.submit(accept)
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            server.shutdown(socket.SHUT_RDWR)


def asking():
    """How many questions are being asked."""
    return len(asyncio.all_tasks(http_host._loop(os.getpid())))


BEGUN = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("begin", "drop", "pause"),
    [
        (BEGUN + b"content-length: 1000\r\n\r\n", b"x", 0.1),
        (BEGUN + b"connection: close\r\n\r\n", b" " * (1 << 12), 0.01),
        (BEGUN + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X: a\r\n", 0.02),
        (BEGUN + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X: a\r\n", 0.02),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
        (BEGUN, b"X", 0.1),
        (b"", None, 0),
    ],
    ids=["body", "endless body", "trailers", "trailers and an end", "continue", "header", "nothing"],
)
def test_an_answer_without_end_is_given_up(begin, drop, pause):
    with endless(begin, drop, pause) as url:
        host, start = http_host.Host(url, seconds=1), time.monotonic()
        with pytest.raises(http_host.HostError, match="has not answered within 1 s"):
            host.get("/models")
        assert time.monotonic() - start < 5
        wait_until(lambda: not asking(), 10)


def test_a_connection_that_is_never_made_is_given_up(monkeypatch):
    host, never = http_host.Host("http://127.0.0.1:1", seconds=0.5), threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **more: never.wait(30))
    start = time.monotonic()
    with pytest.raises(http_host.HostError, match=r"has not answered within 0\.5 s"):
        host.get("/models")
    assert time.monotonic() - start < 5
    never.set()


@pytest.mark.parametrize("count", [1, 3])
def test_a_reader_is_cut_off_from_another_thread(count, alone, folders):
    hangs, asked = threading.Event(), threading.Semaphore(0)

    def change(path, found):
        if hangs.is_set():
            asked.release()
            time.sleep(3)
        return found

    with stub(speaking("vllm", alone, change)) as url, ThreadPoolExecutor() as pool:
        reader = GuardedReader(remote.at(f"{url}/v1", folders[0], None))
        hangs.set()
        reading = pool.submit(reader.read_whole, [[1, 2]] * count, [[2]] * count)
        for _ in range(count):
            assert asked.acquire(timeout=30)
        start = time.monotonic()
        reader.abort()
        with pytest.raises(ReaderError, match="is not asked any more: it was given up"):
            reading.result(30)
        with pytest.raises(ReaderError, match="is not asked any more"):
            reader.read_whole([[1]], [[1]])
        assert time.monotonic() - start < 2
        assert not asked.acquire(blocking=False)


@pytest.mark.parametrize("vocabulary", ["bytes", "union"])
def test_readers_above_pass_an_end_on(vocabulary, monkeypatch):
    # A member over bytes asks its server about each token of the sample.
    monkeypatch.setattr("softmeet.readers.bytes.typical.SAMPLE", "the 1 (a\n")
    with running(serving_of({"m": Ensemble.from_pretrained("mixed/gpt2", "logit-mean")})) as url:
        own = Ensemble.from_pretrained([f"{url}/v1#m+tokenizer=mixed/gpt2+top=all"], "prob-mean", vocabulary=vocabulary)
        own.model.new_reader(0, "m", None).abort()
        with pytest.raises(ReaderError, match="is not asked any more"):
            own.model.members[0].reader.read_whole([[1]], [[1]])


def test_a_server_that_comes_back_gives_the_same_answer_and_one_that_dies_fails_its_texts_alone(
    alone, folders, monkeypatch
):
    monkeypatch.setattr(http_host, "_PAUSE", 0.0)
    left = []

    def change(path, found):
        return (503, "text/plain", "busy") if left and left.pop() else found

    with stub(speaking("vllm", alone, change)) as url:
        both = Ensemble.from_pretrained([member(url, folders, "all"), folders[1]], "prob-mean")
        expected = both.generate(PROMPT, max_new_tokens=6)
        left += [True, True]
        assert both.generate(PROMPT, max_new_tokens=6) == expected
        left += [True] * 9 + [False] * 2
        with pytest.raises(ReaderError, match="answers with status 503"):
            both.generate(PROMPT, max_new_tokens=6)
        left.clear()
        assert both.generate(PROMPT, max_new_tokens=6) == expected


def test_connections_that_were_cut_off_are_not_tried(monkeypatch):
    monkeypatch.setattr(http_host, "_TRIES", 1)
    answer = BEGUN + b"content-length: 2\r\n\r\n{}"
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:

        def answered():
            for _ in range(3):
                with server.accept()[0] as connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)

        pool.submit(answered)
        host = http_host.Host(f"http://127.0.0.1:{server.getsockname()[1]}")
        for _ in range(3):
            assert host.get("/models") == {}
            time.sleep(0.1)


@pytest.mark.parametrize(
    "said",
    [
        lambda key: (403, "application/json", "{}"),
        lambda key: (400, "application/json", json.dumps({"error": {"message": f"bad key {key}"}})),
        lambda key: (400, "application/json", json.dumps({"error": "x" * 286 + key})),
        lambda key: (503, "application/json", json.dumps({"detail": [key]})),
        lambda key: (200, f"text/{key}", "<html>"),
        lambda key: (200, "application/json", json.dumps({"choices": [{"logprobs": {"top_logprobs": [{key: -1.0}]}}]})),
    ],
)
def test_the_key_is_sent_and_never_shown(said, alone, folders, monkeypatch):
    seen = []
    answer = speaking("vllm", alone, lambda path, found: said(seen[-1]) if "completions" in path else found)
    monkeypatch.setattr(http_host, "_PAUSE", 0.0)
    monkeypatch.setenv(http_host.KEY, "secret-key\n")
    shown = lambda *told: seen.append(told[3]["authorization"]) or answer(*told)  # noqa: E731
    with stub(shown) as url, pytest.raises(CheckpointError) as caught:
        remote.at(f"{url}/v1", folders[0], None)
    assert set(seen) == {"Bearer secret-key"}
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_a_key_in_a_status_line_is_not_shown(monkeypatch):
    monkeypatch.setattr(http_host, "_PAUSE", 0.0)
    monkeypatch.setenv(http_host.KEY, "secret-key")
    with endless(b"HTTP/9.9 Bearer secret-key\r\n\r\n", None) as url:
        with pytest.raises(http_host.HostError, match=r"does not answer \(.*\*\*\*") as caught:
            http_host.Host(url).get("/models")
        assert "secret" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv(http_host.KEY, "secret-ключ")
    with pytest.raises(http_host.HostError, match="has other letters than ASCII") as caught:
        http_host.Host(url).get("/models")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_clients_are_not_told_what_a_members_server_says(stream, alone, folders, monkeypatch, caplog):
    monkeypatch.setenv(http_host.KEY, "secret-key")
    fails = []
    change = lambda path, found: (400, "application/json", '{"error": "inner secret-key"}') if fails else found  # noqa: E731
    with stub(speaking("vllm", alone, change)) as url:
        both = Ensemble.from_pretrained([member(url, folders), f"{folders[1]}+name=local"], "prob-mean")
        with running(serving_of({"m": both})) as served, caplog.at_level(logging.ERROR, "softmeet.server"):
            fails.append(True)
            asked = {"prompt": PROMPT, "max_tokens": 3, "stream": stream}
            answer = http.post(f"{served}/v1/completions", json=asked)
    assert answer.status_code == (200 if stream else 500)
    assert "a member failed: the server's log says why" in answer.text
    assert not [word for word in (url[7:], "127.0.0.1", "inner", "secret") if word in answer.text]
    assert f"a member failed: {url}/v1 answers with status 400: inner ***" in caplog.text
    assert "secret" not in caplog.text


def test_saved_ensembles_and_traces_name_no_servers(alone, folders, tmp_path):
    asked = []
    answer = speaking("vllm", alone)
    with stub(lambda *told: asked.append(told[1]) or answer(*told)) as url:
        both = Ensemble.from_pretrained([member(url, folders), folders[1]], "prob-mean")
        with pytest.raises(InvalidInputError, match=f"of a saved ensemble that are .* the server '{url}/v1'.*by -m"):
            both.save_pretrained(tmp_path / "own")
        assert not (tmp_path / "own").exists()
        del both, asked[:]
        saved = tmp_path / "ens"
        Ensemble.from_pretrained(folders, "prob-mean").save_pretrained(saved)
        written = json.loads((saved / "config.json").read_text())
        for line in (member(url, folders), f"vllm:x+tokenizer={url}/v1", f"https{url[4:]}"):
            (saved / "config.json").write_text(json.dumps(written | {"members": [folders[1], line]}))
            for load in (Ensemble.from_pretrained, AutoConfig.from_pretrained):
                with pytest.raises(InvalidInputError, match="expected members of a saved ensemble that are files"):
                    load(str(saved))
            for command in (("generate", "a", "-m", saved), ("check", "-m", saved), ("check", "--plan", "-m", saved)):
                done = run(*command)
                assert done.returncode
                assert "expected members of a saved ensemble that are files" in " ".join(done.stderr.split())
        trace = tmp_path / "trace"
        trace.mkdir()
        facts = dict.fromkeys(("tokenizer", "text", "bos", "window", "stride", "dtype", "documents"))
        facts |= {"format": FORMAT, "members": [{"name": member(url, folders)}]}
        (trace / "trace.json").write_text(json.dumps(facts))
        done = run("evaluate", "--trace", trace)
        assert "expected members of a trace that are files" in " ".join(done.stderr.split())
        (tmp_path / "text").write_text("and the king " * 200)
        for command in (("fit", "--out", tmp_path / "out"), ("advise", "--save", tmp_path / "out")):
            done = run(*command, "-t", tmp_path / "text", "-m", member(url, folders, "all"), "-m", folders[1])
            assert "expected members of a saved ensemble that are files" in " ".join(done.stderr.split())
        assert not asked
