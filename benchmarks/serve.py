"""What a server gives many readers: streams at once, on replicas, and beside a client that means harm."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import re
import time
from collections import Counter
from typing import Annotated, Any

import httpx
import psutil
import typer

from report import JsonPath, Members, commands, median, show
from servers import MEMBER, PROMPTS, Rival, Server

app = commands(__doc__)
Row = dict[str, Any]
OVER_BYTES = 256  # the end of a text over bytes
READER = 5  # tokens a second that somebody reads
_SOME_TEXT = re.compile(rb'"text": ?"[^"]')
_ENDLESS = {"logit_bias": {"0": -100}}
Tokens = Annotated[int, typer.Option(help="Of each answer.")]


def fields(k: int, tokens: int, **more: Any) -> dict[str, Any]:
    """Return the k-th request: a prompt of its own, so that nothing is reused, that runs to its limit."""
    prompt = f"{PROMPTS[k % len(PROMPTS)]} {k}"
    asked = {"prompt": prompt, "max_tokens": tokens, "seed": k, "temperature": 1.0}
    return {**asked, "stream": True, "stream_options": {"include_usage": True}, **more}


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, int]:
    """Return (seconds to the first token, tokens); what comes is read at the end, so that the client costs little."""
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
    """Return the seconds of processor that a process has taken."""
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
    told = {"first token, s": median(waits), "slowest": max(waits)}
    return {"streams": streams, "tokens/s": count / taken, **own, **told}


def served(names: list[str], numbers: list[int], lengths: dict[str, int], end: int, threads: int) -> list[Row]:
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
                same = max(numbers) if end == OVER_BYTES else 0
                found = asyncio.run(measure(server.url, n, length, server.process.pid, same, **more))
                flags = ["--reproducible"] if "--reproducible" in names else []
                rows.append({"server": " ".join(["softmeet,", rule, *flags])} | found)
    finally:
        server.end()
    return rows


@app.command()
def streams(
    counts: Annotated[str, typer.Option(help="Concurrent streams.")] = "1,8,32,64",
    tokens: Tokens = 64,
    meet_tokens: Annotated[int, typer.Option(help="Of each answer by meet.")] = 16,
    family: Annotated[str, typer.Option(help="The bundled family: wide or mixed.")] = "wide",
    member: Members = None,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    rival: Annotated[bool, typer.Option(help="Also time transformers serve.")] = True,
    json: JsonPath = None,
) -> None:
    """Time tokens and first tokens at several numbers of streams.

    The bundled wide family by `logit-mean` and by `meet`, and one of its members under `transformers serve`, with the
    same prompts in the same run, every server with one thread of torch. With --family mixed, or other models, over
    bytes and by the average: tokens are then bytes. Tokens a second of the server's own processor time are those of an
    idle core; times to the first token are the clock's.
    """
    numbers, over_bytes = [int(x) for x in counts.split(",")], bool(member) or family == "mixed"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    lengths = {"logit-mean": tokens} if over_bytes else {"logit-mean": tokens, "meet": meet_tokens}
    end = OVER_BYTES if over_bytes else 0
    if member:
        own = [part for one in member for part in ("-m", one)]
        rows = served([*own, "--vocabulary", "bytes"], numbers, lengths, end, threads)
    else:
        ways = ([family], [family, "--reproducible"])
        rows = [row for names in ways for row in served(names, numbers, lengths, end, threads)]
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
    show("serving", rows, json, tokens=tokens, meet_tokens=meet_tokens)


_PROXY = "ray::ProxyActor"


def _seconds(server: Server, *names: str) -> float:
    """Return seconds of CPU of the server's processes that are called so; of all without names."""
    server_process = psutil.Process(server.process.pid)
    found = [server_process, *server_process.children(recursive=True)]
    own = [p.cpu_times() for p in found if not names or " ".join(p.cmdline()).startswith(names)]
    return float(sum(x.user + x.system for x in own))


@app.command()
def replicas(
    family: Annotated[str, typer.Argument(help="A bundled family.")] = "narrow",
    streams: Annotated[int, typer.Option(help="At once.")] = 32,
    tokens: Tokens = 100,
    numbers: Annotated[str, typer.Option("--replicas", help="Numbers of replicas.")] = "1,2",
    json: JsonPath = None,
) -> None:
    """Time one server beside replicas of it on Ray Serve, by `logit-mean`, and what a token costs.

    That is the CPU of all processes of the server, and that of Ray's proxy, which all replicas share. CPU seconds hold
    on a machine that also has other work to do; rates and times do not.
    """
    more: dict[str, Any] = {"softmeet": {"rule": "logit-mean"}, **_ENDLESS}
    kinds = [("one process", ["--threads", "1"])]
    kinds += [(f"replicas: {n}", ["--replicas", n]) for n in numbers.split(",")]
    rows: list[Row] = []
    for name, arguments in kinds:
        server = Server(f"default={family}", "--batch", str(streams), *arguments)
        try:
            before, all_before = _seconds(server, _PROXY), _seconds(server)
            found = asyncio.run(measure(server.url, streams, tokens, **more))
            spent, everything = _seconds(server, _PROXY) - before, _seconds(server) - all_before
        finally:
            server.end()
        passing, whole = (1e3 * x / (streams * tokens) if x else None for x in (spent, everything))
        costs = {"ms of CPU a token": whole, "of it proxy": passing}
        rows.append({"server": name} | found | costs)
    show(f"{family}, logit-mean, {streams} streams of {tokens} tokens", rows, json)


# The streams that are measured, by name: fields under ``softmeet``.
MEASURED: dict[str, dict[str, Any]] = {
    "logit-mean": {"rule": "logit-mean"}, "meet": {"rule": "meet"}, "meet, trust 20": {"trust": 20},
}  # fmt: skip
HOSTILE: dict[str, dict[str, Any]] = {
    "meet, trust 100": {"softmeet": {"rule": "meet", "trust": 100, "gate": "none"}},
    "meet, trust 100, another trust for each token": {"softmeet": {"rule": "meet", "gate": "none"}},
    **{rule: {"softmeet": {"rule": rule}} for rule in (
        "max-entropy", "least-squares", "min-underestimation", "min-cross-entropy", "min-reverse-cross-entropy",
        "min-squared-cross-entropy",
    )},
    "16 choices of meet, trust 100": {"n": 16, "softmeet": {"rule": "meet", "trust": 100, "gate": "none"}},
    "16 choices of the same settings": {"n": 16},
    "a scored prompt of meet": {"echo": True, "logprobs": 20, "softmeet": {"rule": "meet", "trust": 100, "report": 20}},
    "16 choices with reports": {"n": 16, "logprobs": 20, "softmeet": {"rule": "logit-mean", "report": 20}},
    "16 choices with 1,024 biases": {
        "n": 16, "softmeet": {"rule": "logit-mean"}, "logit_bias": {str(k): -1 for k in range(1024)},
    },
    "long prompts": {"max_tokens": 1, "softmeet": {"rule": "logit-mean"}},
}  # fmt: skip


async def gaps(client: httpx.AsyncClient, body: dict[str, Any]) -> list[float]:
    """Stream an answer and return the seconds between its events."""
    times = []
    async with client.stream("POST", "/v1/completions", json={"stream": True, **_ENDLESS, **body}) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                assert "error" not in json.loads(line[6:]), line
                times.append(time.perf_counter())
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def attack(name: str, k: int) -> dict[str, Any]:
    """Return the k-th request of a hostile kind."""
    words = "And the king said unto them, Go ye and seek the Lord in the mountain of the house "
    body = {"prompt": f"{k} {words}", "max_tokens": 40, "seed": k, "stream": True, **_ENDLESS, **HOSTILE[name]}
    if "another" in name:
        body["softmeet"] = {**body["softmeet"], "trust": 50 + k % 50}
        body["max_tokens"] = 1
    if "prompt" in name:
        body["prompt"] = f"{k} {words * 100}"[:750]
    return body


async def harass(client: httpx.AsyncClient, name: str, seen: list[Any], same: dict[str, Any]) -> None:
    """Send one hostile request after the other; count the tokens that end with each status.

    Args:
        client: of the server.
        name: of the hostile kind.
        seen: gets the counts of every choice that ends, or the text of a refusal, which ends the harassment.
        same: softmeet's fields of the stream that is measured, for a kind that has none of its own.
    """
    for k in range(1 << 30):
        asked = {"softmeet": same, **attack(name, k)}
        asked["softmeet"] = asked["softmeet"] | {"statuses": True}
        async with client.stream("POST", "/v1/completions", json=asked) as stream:
            if stream.status_code != 200:
                seen.append((await stream.aread()).decode()[:300])
                return
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    document = json.loads(line[6:])
                    seen.extend(one.get("softmeet", {}).get("statuses") for one in document.get("choices", []))


async def harassed(url: str, kinds: list[str], tokens: int, repeats: int) -> list[Row]:
    """Measure every stream alone and beside every hostile kind; return the rows of the table."""
    rows = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for measured, fields in MEASURED.items():
            body = {"prompt": "And the king said", "max_tokens": tokens, "seed": 1, "softmeet": fields}
            await gaps(client, body)
            alone = [gap for _ in range(repeats) for gap in await gaps(client, body)]
            rows.append(_row(measured, "nobody", alone, alone, []))
            for kind in kinds:
                seen: list[Any] = []
                task = asyncio.create_task(harass(client, kind, seen, fields))
                await asyncio.sleep(0.5)
                found = [gap for _ in range(repeats) for gap in await gaps(client, body)]
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                rows.append(_row(measured, kind, alone, found, seen))
    return rows


def by_kind(rows: list[Row]) -> list[Row]:
    """Return a row for each hostile kind, with the gaps of every stream beside it."""
    found: dict[str, Row] = {}
    for row in rows:
        own = found.setdefault(row["beside"], {"beside": row["beside"]})
        own |= {row["stream"]: row["over alone"], f"{row['stream']}, ms": row["median gap, ms"]}
        own |= {f"{row['stream']}, largest": row["largest gap, ms"]}
    return list(found.values())


def _row(measured: str, kind: str, alone: list[float], found: list[float], seen: list[Any]) -> dict[str, Any]:
    refused = next((entry for entry in seen if isinstance(entry, str)), "")
    counts = Counter[str]()
    for entry in seen:
        counts.update(entry if isinstance(entry, dict) else {})
    return {
        "stream": measured, "beside": kind, "median gap, ms": 1e3 * median(found),
        "over alone": median(found) / median(alone), "largest gap, ms": 1e3 * max(found),
        "hostile tokens": refused or ", ".join(f"{n} {name}" for name, n in counts.items()),
    }  # fmt: skip


@app.command()
def hostile(
    family: Annotated[str, typer.Option(help="The bundled family that is served.")] = "wide",
    kinds: Annotated[str, typer.Option(help="Hostile kinds whose names have this part.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of the measured stream, each time.")] = 100,
    repeats: Annotated[int, typer.Option(help="How often it is measured in each company.")] = 3,
    threads: Annotated[int, typer.Option(help="PyTorch threads of the server.")] = 1,
    token_seconds: Annotated[float, typer.Option(help="The server's --token-seconds.")] = 1.0,
    json: JsonPath = None,
) -> None:
    """Measure what one client can do to the others: a stream alone, and then beside one of each hostile kind.

    Told are its seconds between two tokens, their median and their largest, and the ratio of medians. The hostile
    stream has no break, and the server a process of its own.
    """
    server = Server(family, "--threads", str(threads), "--token-seconds", str(token_seconds))
    try:
        chosen = [kind for kind in HOSTILE if kinds in kind]
        rows = asyncio.run(harassed(server.url, chosen, tokens, repeats))
    finally:
        server.end()
    title = f"one stream beside one hostile stream, {family}: the median gap over that alone, and the largest in ms"
    show(title, by_kind(rows), json, tokens=tokens, repeats=repeats, each=rows)


if __name__ == "__main__":
    app()
