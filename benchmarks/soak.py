"""Many streams for minutes, then thousands of malformed requests: python benchmarks/soak.py

A server in a process of its own; every seeded answer is compared with the one that the same request got alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from report import show

# Seconds after which an answer counts as never coming.
PATIENCE = 120.0
PROMPTS = ["And the king said unto", "In the beginning", "O my lord,", "The", "Thou shalt not", "What is", "Enter a"]


class Server:
    """``softmeet serve`` as a process, on a free port."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "softmeet.cli.main", "serve", *arguments, "--port", "0", "--no-ui"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                return
        raise RuntimeError("the server did not start:\n" + "".join(self.lines))

    def megabytes(self) -> float:
        """Resident memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def end(self) -> str:
        """Send SIGTERM and wait; what was printed."""
        self.process.send_signal(signal.SIGTERM)
        return "".join(self.lines) + self.process.communicate(timeout=60)[0]


def asked(k: int, tokens: int) -> dict[str, Any]:
    """The k-th request: seeded, streamed, of one of a few prompts, never ended by the end of a text."""
    return {
        "prompt": PROMPTS[k % len(PROMPTS)], "max_tokens": 1 + k % tokens, "seed": k, "stream": True, "logprobs": 0,
        "logit_bias": {"0": -100}, "softmeet": {"rule": "logit-mean"} if k % 4 else {},
    }  # fmt: skip


async def answered(client: httpx.AsyncClient, fields: dict[str, Any]) -> tuple[list[str], str | None]:
    """(tokens, how it ended) of a stream."""
    tokens: list[str] = []
    reason: str | None = None
    async with client.stream("POST", "/v1/completions", json=fields) as stream:
        if stream.status_code != 200:
            return tokens, f"status {stream.status_code}"
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                document = json.loads(line[6:])
                if "error" in document:
                    return tokens, json.dumps(document)
                choice = document["choices"][0]
                tokens += choice["logprobs"]["tokens"]
                reason = choice["finish_reason"] or reason
    return tokens, reason


async def load(url: str, streams: int, seconds: float, tokens: int, memory: Any) -> dict[str, Any]:
    """Keep so many streams going; every answer is checked against the one of its request alone."""
    limits = httpx.Limits(max_connections=streams + 4)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        kinds = 28
        alone = [await answered(client, asked(k, tokens)) for k in range(kinds)]
        seen: Counter[str] = Counter()
        sizes, started = [memory()], time.monotonic()

        async def one(k: int) -> None:
            while time.monotonic() < started + seconds:
                found = await answered(client, asked(k % kinds, tokens))
                seen["answers"] += 1
                seen["tokens"] += len(found[0])
                seen["wrong"] += found != alone[k % kinds]
                seen["errors"] += found[1] != "length"
                k += streams
                sizes.append(memory())

        await asyncio.gather(*(one(k) for k in range(streams)))
    taken = time.monotonic() - started
    return {
        "streams": streams, "seconds": taken, "answers": seen["answers"], "tokens": seen["tokens"],
        "tokens/s": seen["tokens"] / taken, "errors": seen["errors"], "mixed up": seen["wrong"],
        "MB at half time": sizes[len(sizes) // 2], "MB at the end": sizes[-1],
    }  # fmt: skip


def malformed(generator: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body that must be refused, and its headers."""
    headers = {"content-type": "application/json"}
    fields: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
    kind = generator.randrange(7)
    if kind == 0:
        return bytes(generator.randrange(256) for _ in range(generator.randrange(200))) + b"\xff", headers
    if kind == 1:
        return json.dumps(fields).encode()[: generator.randrange(1, 20)], headers
    if kind == 2:
        number = generator.choice(["NaN", "-Infinity", "1e400", "9" * 5000, "01", "0x1"])
        return f'{{"prompt":"a","temperature":{number}}}'.encode(), headers
    if kind == 3:
        depth = generator.randrange(300, 100_000)
        return b'{"prompt":' + b"[" * depth + b"]" * depth + b"}", headers
    if kind == 4:
        return json.dumps(fields | {generator.choice(["tools", "x", "softmet", "\u2603" * 300]): 1}).encode(), headers
    if kind == 5:
        return b'{"prompt":"' + b"x" * generator.randrange(2_000_000) + b'","temperature":9}', headers
    name = generator.choice(
        ["max_tokens", "n", "temperature", "stop", "logit_bias", "softmeet", "seed", "stream", "echo"]
    )
    bad = {"seed": ["x", [], {}, 2**70, 1.5], "stop": [1, {}, "", [""], True]}.get(
        name, ["x", -1, [-1], [[]], 2**70, "\u0000"]
    )
    return json.dumps(fields | {name: generator.choice(bad)}).encode(), headers


async def abuse(url: str, count: int) -> dict[str, Any]:
    """Malformed bodies, slow ones and disconnects; every 50th request is a good one."""
    generator = random.Random(0)  # noqa: S311
    seen: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        good = {"prompt": "And the king", "max_tokens": 4, "seed": 3, "softmeet": {"rule": "logit-mean"}}
        expected = (await client.post("/v1/completions", json=good)).json()["choices"][0]["text"]
        gate = asyncio.Semaphore(16)

        async def one(k: int) -> None:
            async with gate:
                if k % 50 == 0:
                    response = await client.post("/v1/completions", json=good)
                    fine = response.status_code == 200 and response.json()["choices"][0]["text"] == expected
                    seen["good" if fine else "good gone wrong"] += 1
                elif k % 50 == 1:
                    await _leave(url, generator)
                    seen["left"] += 1
                else:
                    content, headers = malformed(generator)
                    response = await client.post("/v1/completions", content=content, headers=headers)
                    refused = 400 <= response.status_code < 500 and set(response.json()) == {"error"}
                    seen["refused" if refused else f"status {response.status_code}"] += 1

        await asyncio.gather(*(one(k) for k in range(count)))
    return dict(seen)


def fuzz(url: str, examples: int) -> Counter[str]:
    """What schemathesis makes of the OpenAPI document: valid and invalid requests to every operation."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode

    seen: Counter[str] = Counter()
    quiet = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def check(case: Any) -> None:
        seen[_outcome(case)] += 1

    def check_possible(case: Any) -> None:
        if isinstance(case.body, dict):
            # Names that exist cannot be guessed from a schema.
            case.body = {k: x for k, x in case.body.items() if k not in ("model", "softmeet", "logit_bias")}
        check(case)

    for operation in (
        found.ok() for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()
    ):
        for mode, checked in ((GenerationMode.POSITIVE, check_possible), (GenerationMode.NEGATIVE, check)):
            try:
                quiet(given(case=operation.as_strategy(generation_mode=mode))(checked))()
            except Unsatisfiable:
                seen["nothing to make"] += 1
    return seen


def _outcome(case: Any) -> str:
    import requests

    try:
        # A valid request may ask for hundreds of tokens.
        response = case.call(timeout=PATIENCE)
    except requests.exceptions.Timeout:
        return "hung, wrong"
    if 400 <= response.status_code < 500 and set(response.json()) == {"error"}:
        return "refused"
    return "answered" if response.status_code == 200 else "wrong"


async def _leave(url: str, generator: random.Random) -> None:
    """Open a connection, say half of something, or start a stream, and go."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"prompt": "a", "max_tokens": 50, "stream": True, "softmeet": {"rule": "logit-mean"}}).encode()
    lines = ["POST /v1/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    whole = head.encode() + body
    writer.write(whole[: generator.choice([len(whole), len(whole) - 5, len(head), 20])])
    await writer.drain()
    await asyncio.wait([asyncio.ensure_future(reader.read(200))], timeout=0.05)
    writer.close()


def main(
    seconds: Annotated[float, typer.Option(help="Of load.")] = 300,
    streams: Annotated[int, typer.Option()] = 64,
    requests: Annotated[int, typer.Option(help="Malformed ones.")] = 10_000,
    examples: Annotated[int, typer.Option(help="Of schemathesis, for each operation, valid and not.")] = 200,
    tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 40,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print one table; exit code 1 if anything was lost, mixed up or answered wrongly."""
    server = Server("--batch", str(streams))
    figures: dict[str, Any] = {}
    try:
        figures |= asyncio.run(load(server.url, streams, seconds, tokens, server.megabytes))
        figures |= asyncio.run(abuse(server.url, requests))
        figures |= {f"schemathesis: {name}": count for name, count in fuzz(server.url, examples).items()}
        alive = httpx.get(f"{server.url}/health").status_code == 200
    finally:
        printed = server.end()
        show("soak", [figures], json_to)
    odd = [name for name in figures if name.startswith("status") or name.endswith("wrong")]
    grown = figures["MB at the end"] > 1.15 * figures["MB at half time"]
    if figures["errors"] or figures["mixed up"] or odd or grown or not alive or "Traceback" in printed:
        typer.echo(printed)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
