"""Pages of other origins, in a real browser: those that the server allows get answers and refusals, others nothing."""

import http.server
import threading

import pytest
from browser import PATIENCE, needs_chromium
from serving import http as client
from serving import running, serving_of, tiny_ensemble

from softmeet.server.security import Protection

# What OpenAI's client for JavaScript sends beside the key.
HEADERS = {
    "accept": "application/json", "content-type": "application/json", "idempotency-key": "stainless-node-retry-1",
    "openai-beta": "assistants=v2", "openai-organization": "o", "openai-project": "p", "x-stainless-arch": "unknown",
    "x-stainless-helper-method": "stream", "x-stainless-lang": "js", "x-stainless-os": "Unknown",
    "x-stainless-package-version": "6.0.0", "x-stainless-retry-count": "0", "x-stainless-runtime": "browser:chrome",
    "x-stainless-runtime-version": "140.0.0", "x-stainless-timeout": "600",
}  # fmt: skip
BODY = {"prompt": "hello", "max_tokens": 4, "seed": 1}
FETCH = """async ([url, headers, body]) => {
    try {
        const answer = await fetch(url, {method: "POST", headers, body: JSON.stringify(body)});
        return [answer.status, await answer.text(), answer.headers.get("retry-after")];
    } catch (error) {
        return [0, String(error), null];
    }
}"""


class Page(http.server.BaseHTTPRequestHandler):
    """An empty page, which is of the origin at whose port it is asked for."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def origins():
    """Two origins: the first is allowed."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def serving(origins):
    return serving_of(
        {"plain": tiny_ensemble("gpt2", rule="logit-mean")}, protection=Protection(keys=("key",)), cors=origins[:1]
    )


@pytest.fixture(scope="module")
def url(serving):
    with running(serving) as found:
        yield found


@pytest.fixture(scope="module")
def pages(browser, origins):
    """A page of each origin."""
    found = [browser.new_page() for _ in origins]
    for page, origin in zip(found, origins, strict=True):
        page.set_default_timeout(PATIENCE)
        page.goto(origin)
    return found


def fetched(page, url, key="key", **fields):
    headers = HEADERS | {"authorization": f"Bearer {key}"}
    return page.evaluate(FETCH, [f"{url}/v1/completions", headers, BODY | fields])


@needs_chromium
def test_a_page_that_is_allowed_gets_answers_streams_and_refusals(pages, url):
    status, text, _ = fetched(pages[0], url)
    assert (status, '"text_completion"' in text) == (200, True)
    status, text, _ = fetched(pages[0], url, stream=True)
    assert (status, text.endswith("data: [DONE]\n\n")) == (200, True)
    status, text, _ = fetched(pages[0], url, key="wrong")
    assert (status, "expected a valid API key" in text) == (401, True)
    assert fetched(pages[0], url, temperature=3)[0] == 400


@needs_chromium
def test_a_page_that_is_not_allowed_gets_nothing(pages, url, serving):
    before = serving.metrics.registry.get_sample_value("softmeet_tokens_total")
    for fields in ({}, {"stream": True}):
        assert fetched(pages[1], url, **fields)[:2] == [0, "TypeError: Failed to fetch"]
    # The browser asks first, so that the request itself was never sent.
    assert serving.metrics.registry.get_sample_value("softmeet_tokens_total") == before


def test_every_answer_to_an_allowed_origin_says_so(url, origins, serving, monkeypatch):
    origin, key = {"origin": origins[0]}, {"authorization": "Bearer key"}
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": ", ".join(HEADERS)}
    found = client.options(f"{url}/v1/completions", headers=origin | preflight)
    assert found.status_code == 200
    assert set(HEADERS) <= {name.strip() for name in found.headers["access-control-allow-headers"].split(",")}
    assert found.headers["x-content-type-options"] == "nosniff"
    path, counted = f"{url}/v1/completions", serving.metrics.requests
    answers = {
        401: client.post(path, headers=origin, json=BODY),
        404: client.get(f"{url}/nowhere", headers=origin | key),
        413: client.post(path, headers=origin | key, content=b" " * 2_000_000),
        415: client.post(path, headers=origin | key, content=b"{}"),
    }
    serving.batcher.close(0)
    answers[503] = client.post(path, headers=origin | key, json=BODY)

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(serving.ensembles, "find", broken)
    answers[500] = client.post(path, headers=origin | key, json=BODY)
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == origins[0]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert counted.labels("/v1/completions", 500)._value.get() == 1
