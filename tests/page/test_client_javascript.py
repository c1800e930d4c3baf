"""OpenAI's client for JavaScript in a real browser: a page of another origin, with a key, and all that it can ask."""

from __future__ import annotations

import contextlib
import http.server as servers
import os
import re
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path
from types import MappingProxyType

import pytest
from browser import PATIENCE, needs_chromium
from serving import TEMPLATE, http, running, serving_of, tiny_ensemble

from softmeet.server.security import Protection

PACKAGE = "openai@7"
# CI says that npm has to be there.
needs_npm = pytest.mark.skipif(
    shutil.which("npm") is None and "REQUIRE_NPM" not in os.environ, reason="there is no npm: apt-get install npm"
)
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "clients.md"
PAGE = """<!doctype html><body></body>
<script type="importmap">{"imports": {"openai": "/node_modules/openai/index.mjs"}}</script>
<script type="module" src="/page.mjs"></script>"""
CLIENT = """
import OpenAI from "openai";
const collected = async (stream) => {
    const found = [];
    for await (const event of stream) found.push(event);
    return found;
};
const PROMPT = {model: "default", seed: 3, prompt: "hello", max_tokens: 6, top_k: 5};
const CHAT = {model: "default", seed: 3, messages: [{role: "user", content: "hi"}], max_tokens: 6};
const INPUT = {model: "default", seed: 3, input: "hi", max_output_tokens: 6};
const LONG = {model: "default", input: "hi", temperature: 0, logit_bias: {0: 100}, min_tokens: 4};
const asks = {
    models: async (client) => (await collected(client.models.list())).map((model) => model.id),
    completion: async (client) => (await client.completions.create(PROMPT)).choices[0].text,
    completionStream: async (client) => {
        const chunks = await collected(await client.completions.create({...PROMPT, stream: true}));
        return chunks.map((chunk) => chunk.choices[0].text).join("");
    },
    chat: async (client) => (await client.chat.completions.create(CHAT)).choices[0].message.content,
    chatStream: async (client) => {
        const answer = await client.chat.completions.stream(CHAT).finalChatCompletion();
        return answer.choices[0].message.content;
    },
    response: async (client) => (await client.responses.create(INPUT)).output_text,
    responseStream: async (client) => {
        const events = await collected(await client.responses.create({...INPUT, stream: true}));
        return events.filter((event) => event.type === "response.output_text.delta").map((e) => e.delta).join("");
    },
    responseHelper: async (client) => (await client.responses.stream(LONG).finalResponse()).output_text,
    refused: async (client) => client.completions.create({...PROMPT, suffix: "x"}),
};
window.ask = async (name, [baseURL, apiKey]) => {
    try {
        return await asks[name](new OpenAI({baseURL, apiKey, dangerouslyAllowBrowser: true, maxRetries: 0}));
    } catch (error) {
        return [error.constructor.name, error.status ?? null, error.param ?? null, error.message];
    }
};
window.ready = true;
"""


class Pages(servers.SimpleHTTPRequestHandler):
    """An empty page that loads the client, and the files of its package."""

    extensions_map = MappingProxyType({".mjs": "text/javascript", "": "application/octet-stream"})

    def do_GET(self):
        found = {"/": ("text/html", PAGE), "/page.mjs": ("text/javascript", CLIENT)}.get(self.path)
        if found is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("content-type", found[0])
        self.end_headers()
        self.wfile.write(found[1].encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def origins(tmp_path_factory):
    """Two origins with a page that has the client, as npm installs it; the first is allowed."""
    folder = tmp_path_factory.mktemp("client")
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "REQUIRE_NPM" not in os.environ:
        pytest.skip(f"npm cannot install {PACKAGE}: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    handler = partial(Pages, directory=folder)
    found = [servers.ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    for server in found:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in found]
    for server in found:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def url(origins):
    chatty = tiny_ensemble("gpt2", "llama", rule="logit-mean", template=TEMPLATE)
    protection = Protection(keys=("sesame",))
    with running(serving_of({"default": chatty}, protection=protection, cors=origins[:1])) as found:
        yield f"{found}/v1"


@contextlib.contextmanager
def opened(browser, origin):
    page = browser.new_page()
    try:
        page.set_default_timeout(PATIENCE)
        page.goto(origin)
        page.wait_for_function("window.ready")
        yield page
    finally:
        page.close()


def ask(page, name, url, key="sesame"):
    return page.evaluate("([name, where]) => window.ask(name, where)", [name, [url, key]])


@pytest.mark.slow
@needs_chromium
@needs_npm
def test_the_client_gets_answers_streams_and_refusals_on_a_page_that_is_allowed(browser, origins, url):
    with opened(browser, origins[0]) as page:
        assert ask(page, "models", url) == ["default"]
        for name in ("completion", "chat", "response"):
            whole = ask(page, name, url)
            assert isinstance(whole, str), whole
            assert len(whole) == 6
            assert ask(page, f"{name}Stream", url) == whole
        assert ask(page, "response", url) == ask(page, "chat", url)
        assert len(ask(page, "responseHelper", url)) == 4
        name, status, param, message = ask(page, "refused", url)
        assert (name, status, param) == ("BadRequestError", 400, "suffix")
        assert "suffix is not supported" in message
        assert ask(page, "completion", url, key="wrong")[:2] == ["AuthenticationError", 401]


@pytest.mark.slow
@needs_chromium
@needs_npm
def test_the_client_gets_nothing_on_a_page_that_is_not_allowed(browser, origins, url):
    with opened(browser, origins[1]) as page:
        for name in ("models", "completion", "chatStream", "responseStream"):
            assert ask(page, name, url)[0] == "APIConnectionError"


@pytest.mark.slow
@needs_chromium
@needs_npm
def test_the_guides_program_shows_the_answer(browser, origins, url):
    (code,) = re.findall(r"^```js\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8001/v1" in code
    with opened(browser, origins[0]) as page:
        page.add_script_tag(content=code.replace("http://127.0.0.1:8001/v1", url), type="module")
        asked = {"messages": [{"role": "user", "content": "Who is it?"}], "seed": 1, "max_tokens": 8}
        answer = http.post(f"{url}/chat/completions", json=asked, headers={"authorization": "Bearer sesame"})
        expected = answer.json()["choices"][0]["message"]["content"]
        # The page's body has text of its own, the import map, until the program shows the answer in its place.
        page.wait_for_function("expected => document.body.textContent === expected", arg=expected)
