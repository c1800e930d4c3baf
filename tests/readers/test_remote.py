"""A model behind a server as a member: servers that answer as llama.cpp's and vLLM do, softmeet's own, and bad ones."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from contextlib import contextmanager, suppress
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
import torch
from serving import running, serving_of

from softmeet import Ensemble
from softmeet.errors import CheckpointError, InvalidInputError, ReaderError
from softmeet.hf import TokenReports
from softmeet.readers import http_host, remote
from softmeet.readers.reader import Read, finished
from softmeet.testing import check_reader, random_texts

PROMPT = "And the king"
# What vLLM 0.32 and llama.cpp's server answered, the latter about SmolLM2, to two tokens.
RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text(encoding="utf-8"))
MODEL = "org/model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two members; the first is also that of the servers."""
    folder = tmp_path_factory.mktemp("members")
    return [str(tiny.save(folder / name, name, seed=k)) for k, name in enumerate(("gpt2", "llama"))]


@pytest.fixture(scope="module")
def alone(folders):
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


@pytest.mark.parametrize("protocol", ["llama.cpp", "vllm"])
def test_what_servers_tell(protocol, alone, folders):
    with stub(speaking(protocol, alone)) as url:
        for top in ("all", "12"):
            reader = remote.at(f"{url}/v1#{MODEL}", folders[0], top)
            assert (reader.limit, reader.traits.known) == (63, None if top == "all" else 12)
            check_reader(reader)
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
            assert both.generate(PROMPT, max_new_tokens=16, **how) == local.generate(PROMPT, max_new_tokens=16, **how)
        reader = both.model.members[0].reader
        assert reader.limit == alone.model.config.max_position_embeddings - 1
        check_reader(reader)


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


def test_addresses_that_are_none(folders, monkeypatch):
    monkeypatch.setattr(http_host, "_PAUSE", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(CheckpointError, match=r"does not answer .*: start the server, or check the address"):
        remote.at(url, folders[0], None)
    with pytest.raises(
        InvalidInputError, match=r"without a name and a key, .* got http://host/v1: put the key"
    ) as caught:
        remote.at("http://me:secret@host/v1", folders[0], None)
    assert "secret" not in str(caught.value)
    for wrong in ("http://", "http:///v1", "http://host:port/v1", "http://host/v1?key=1"):
        with pytest.raises(InvalidInputError, match=r"expected (an|the) address"):
            remote.at(wrong, folders[0], None)
    with pytest.raises(InvalidInputError, match=r"put \+tokenizer=NAME behind it"):
        Ensemble.from_pretrained(f"{url}#m")
    with pytest.raises(InvalidInputError, match=r"expected a number of tokens or all, got \+top=few"):
        Ensemble.from_pretrained(f"{url}#m+tokenizer={folders[0]}+top=few")
    with pytest.raises(InvalidInputError, match="got dtype: leave it out"):
        Ensemble.from_pretrained(f"{url}#m+dtype=bfloat16")


def test_a_server_that_is_slow_or_endless_is_given_up(alone, folders, monkeypatch):
    late = threading.Event()

    def change(path, found):
        if "completions" in path:
            late.wait(5)
        return found

    with stub(speaking("vllm", alone, change)) as url:
        host = http_host.Host(f"{url}/v1", seconds=0.3)
        start = time.monotonic()
        with pytest.raises(http_host.HostError, match=r"has not answered within 0\.3 s"):
            host.post(
                "/completions", {"prompt": [1], "logprobs": 3, "max_tokens": 1, "return_tokens_as_token_ids": True}
            )
        assert time.monotonic() - start < 4
        late.set()
        monkeypatch.setattr(http_host, "_MOST", 10)
        with pytest.raises(http_host.HostError, match="answers with more than"):
            host.get("/models")


def test_an_answer_that_comes_drop_by_drop_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def drip():
            with suppress(OSError):
                connection = server.accept()[0]
                with connection:
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
                    for _ in range(100):
                        connection.sendall(b"x")
                        time.sleep(0.1)

        thread = threading.Thread(target=drip)
        thread.start()
        host, start = http_host.Host(f"http://127.0.0.1:{server.getsockname()[1]}", seconds=1), time.monotonic()
        with pytest.raises(http_host.HostError, match="has not answered within 1 s"):
            host.get("/models")
        assert time.monotonic() - start < 8
        thread.join()


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


def test_connections_that_were_cut_off_are_not_tried_one_by_one(alone, monkeypatch):
    monkeypatch.setattr(http_host, "_PAUSE", 0.0)
    with stub(speaking("vllm", alone)) as url:
        host = http_host.Host(f"{url}/v1")
        for _ in range(5):
            cut = host._connect()
            cut.connect()
            cut.sock.shutdown(socket.SHUT_RDWR)
            host._idle.append(cut)
        assert host.get("/models")["data"]
        assert len(host._idle) == 1


def test_the_key_is_sent_and_never_shown(alone, folders, monkeypatch):
    seen = []
    answer = speaking("vllm", alone, lambda path, found: (403, "application/json", "{}") if seen[2:] else found)
    monkeypatch.setenv(http_host.KEY, "secret-key")
    shown = lambda *told: seen.append(told[3]["authorization"]) or answer(*told)  # noqa: E731
    with stub(shown) as url, pytest.raises(CheckpointError, match="refuses the key") as caught:
        remote.at(f"{url}/v1", folders[0], None)
    assert set(seen) == {"Bearer secret-key"}
    assert "secret-key" not in str(caught.value)
