"""A server in a thread, over tiny members or whatever is given."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import tiny
import uvicorn
from commands import run

from softmeet import Ensemble
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.server.ensembles import Ensembles, Served
from softmeet.server.process import configuration
from softmeet.server.serving import ServerSettings, Serving

# A connection for each request, as httpx itself has it; but patient, since on a busy machine an answer may take longer
# than its five seconds, and without certificates, which httpx would read for every request.
http = httpx.Client(timeout=300, verify=False, limits=httpx.Limits(max_keepalive_connections=0))
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}!{% endfor %}a:"
)


def tiny_ensemble(*names, rule="meet", seeds=(0, 1), template=None, models=None):
    config = EnsembleConfig(members=[f"tiny/{name}" for name in names], rule=rule, trust=1.0)
    found = models or [tiny.build(name, seed=seed) for name, seed in zip(names, seeds, strict=False)]
    model, tokenizer = EnsembleForCausalLM(config, found).eval(), tiny.tokenizer()
    tokenizer.chat_template = template
    model.adopt(tokenizer)
    return Ensemble(model, tokenizer)


def chunks(url, body):
    """The JSON of the events of a streamed answer."""
    with http.stream("POST", url, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def serving_of(ensembles, **settings):
    served = [Served(name, e, tuple(e.names)) for name, e in ensembles.items()]
    return Serving(Ensembles(served), ServerSettings(**{"ui": False} | settings))


@contextlib.contextmanager
def running(serving, send_buffer=None):
    """(base URL) of a server that runs in a thread while this lasts; its sockets keep ``send_buffer`` bytes."""
    server = uvicorn.Server(configuration(serving, port=0, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    if send_buffer is not None:
        server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(300)


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def serve(*arguments, meanwhile):
    """(what ``softmeet serve`` does in this process, what ``meanwhile(url)`` returns, which has to end it by a signal).

    The latter runs in a thread of its own, from when the server answers.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, ended = f"http://127.0.0.1:{port}", threading.Event()

    def visit():
        while not accepts(url):
            assert not ended.wait(0.05)
        try:
            return meanwhile(url)
        except BaseException:
            while not ended.wait(1):
                os.kill(os.getpid(), signal.SIGINT)
            raise

    with ThreadPoolExecutor(1) as pool:
        visited = pool.submit(visit)
        done = run("serve", *arguments, "--port", port)
        ended.set()
        return done, visited.result()


def accepts(url):
    """Whether a server takes new connections."""
    try:
        return http.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
