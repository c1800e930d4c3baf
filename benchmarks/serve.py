"""Tokens a second and time to first token at several numbers of streams: python benchmarks/serve.py

The bundled wide family by `logit-mean` and by `meet`, and one of its members under `transformers serve`, with the same
prompts in the same run, every server with one thread of torch. With `--family mixed`, or members of one's own (`-m`),
over bytes and by the average: tokens are then bytes. Tokens a second of the server's own processor time are those of an
idle core; times to the first token are the clock's.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import psutil
import typer

from report import show
from servers import PROMPTS, Server
from softmeet.members import zoo

MEMBER = "wide/gpt2"
OVER_BYTES = 256  # the end of a text over bytes
READER = 5  # tokens a second that somebody reads
_SOME_TEXT = re.compile(rb'"text": ?"[^"]')


class Rival:
    """``transformers serve`` with one model, by default a bundled member."""

    def __init__(self, model: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.model, self.url = model or zoo.locate(MEMBER), f"http://127.0.0.1:{port}"
        command = [str(Path(sys.executable).parent / "transformers"), "serve", "--port", str(port), "--device", "cpu"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.TransportError:
                time.sleep(0.5)
        raise RuntimeError("transformers serve did not start")

    def end(self) -> None:
        """Send SIGTERM and wait."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


def fields(k: int, tokens: int, **more: Any) -> dict[str, Any]:
    """The k-th request: a prompt of its own, so that nothing is reused, that runs to its limit."""
    prompt = f"{PROMPTS[k % len(PROMPTS)]} {k}"
    return {"prompt": prompt, "max_tokens": tokens, "seed": k, "stream": True, "temperature": 1.0, **more}


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, int]:
    """(seconds to the first token, tokens); what comes is read at the end, so that the client costs little."""
    started, first, whole = time.perf_counter(), 0.0, b""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for piece in answer.aiter_raw():
            whole += piece
            if not first and _SOME_TEXT.search(whole):
                first = time.perf_counter() - started
    chunks = [json.loads(line[6:]) for line in whole.decode().splitlines() if line.startswith("data: {")]
    usage = next(chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage"))
    return first, usage.get("softmeet", {}).get("completion_bytes", usage["completion_tokens"])


def spent(process: int | None) -> float:
    """Seconds of processor that a process has taken."""
    return 0.0 if process is None else float(sum(psutil.Process(process).cpu_times()[:2]))


async def measure(
    url: str, streams: int, tokens: int, process: int | None = None, requests: int = 0, **more: Any
) -> dict[str, Any]:
    """Time some requests, so many streams at once, until the last has ended; by default one request for each stream.

    With the id of the server's process, what its processor took is told as well.
    """
    limits, turns = httpx.Limits(max_connections=streams), asyncio.Semaphore(streams)

    async def one(client: httpx.AsyncClient, k: int) -> tuple[float, int]:
        async with turns:
            return await stream(client, fields(k, tokens, **more))

    async with httpx.AsyncClient(base_url=url, timeout=1200, limits=limits) as client:
        await stream(client, fields(10_000, 2, **more))
        started, before = time.perf_counter(), spent(process)
        runs = await asyncio.gather(*(one(client, k) for k in range(requests or streams)))
        taken, busy = time.perf_counter() - started, spent(process) - before
    waits, count = [first for first, _ in runs], sum(count for _, count in runs)
    own = {"tokens a second of its processor": count / busy} if process else {}
    return {
        "streams": streams,
        "tokens/s": count / taken,
        **own,
        "first token, s": median(waits),
        "slowest": max(waits),
    }


def served(
    names: list[str], numbers: list[int], lengths: dict[str, int], end: int, threads: int
) -> list[dict[str, Any]]:
    """Time a server of ours.

    Args:
        names: its ensembles or members, and other arguments of ``softmeet serve``.
        numbers: of streams; over bytes, where texts differ in cost, the same requests are made with each.
        lengths: the tokens of each answer by each rule.
        end: the id of the token that is not to come.
        threads: of torch.
    """
    # What a batch gives is measured against one stream that runs as in a batch.
    server, rows = Server(*names, "--batch", str(max(numbers)), "--threads", str(threads), "--speculate", "0"), []
    try:
        for rule, length in lengths.items():
            for n in numbers:
                limit = {"max_bytes": length} if end == OVER_BYTES else {}
                more = {"softmeet": {"rule": rule} | limit, "logit_bias": {str(end): -100}}
                more["stream_options"] = {"include_usage": True}
                same = max(numbers) if end == OVER_BYTES else 0
                found = asyncio.run(measure(server.url, n, length, server.process.pid, same, **more))
                flags = ["--reproducible"] if "--reproducible" in names else []
                rows.append({"server": " ".join(["softmeet,", rule, *flags])} | found)
    finally:
        server.end()
    return rows


def main(
    counts: Annotated[str, typer.Option(help="Concurrent streams.")] = "1,8,32,64",
    tokens: Annotated[int, typer.Option(help="Of each answer.")] = 64,
    meet_tokens: Annotated[int, typer.Option(help="Of each answer by meet.")] = 16,
    family: Annotated[str, typer.Option(help="The bundled family: wide or mixed.")] = "wide",
    member: Annotated[
        list[str] | None,
        typer.Option("--member", "-m", help="In place of a family, and of rivals: a model; repeat it; over bytes."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    rival: Annotated[bool, typer.Option(help="Also time transformers serve.")] = True,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    numbers, over_bytes = [int(x) for x in counts.split(",")], bool(member) or family == "mixed"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    lengths = {"logit-mean": tokens} if over_bytes else {"logit-mean": tokens, "meet": meet_tokens}
    end = OVER_BYTES if over_bytes else 0
    if member:
        own = [part for one in member for part in ("-m", one)]
        rows = served([*own, "--vocabulary", "bytes"], numbers, lengths, end, threads)
    else:
        rows = [
            row
            for flags in ([], ["--reproducible"])
            for row in served([family, *flags], numbers, lengths, end, threads)
        ]
    if rival and not member:
        other = Rival()
        try:
            for n in numbers:
                found = asyncio.run(measure(other.url, n, tokens, other.process.pid, model=other.model))
                rows.append({"server": f"transformers serve, {MEMBER}"} | found)
        finally:
            other.end()
    for row in rows:
        alone = next(r for r in rows if r["server"] == row["server"])
        rate = "tokens a second of its processor"
        row["over one stream"] = row[rate] / alone[rate]
        row["cores for 1,000 readers"] = math.ceil(1000 * READER / row[rate])
    show("serving", rows, json_to, tokens=tokens, meet_tokens=meet_tokens)


if __name__ == "__main__":
    typer.run(main)
