"""Two servers under all that clients do at once, for an hour: python benchmarks/soak.py --hours 1

Streams and whole answers by many rules, clients that leave, read slowly or send half of a request, malformed requests
and hostile ones. One server lives all the time, and its memory is judged; the other is killed without warning every few
minutes and started again. Every seeded answer that was complete is compared with the one that the same request got
while the server was idle.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from malformed import PATIENCE, fuzz, hostile, malformed
from report import quantile, show
from servers import PROMPTS, Site

# How much of what is allocated may grow in an hour, as a share of its median.
GROWTH = 0.05
# Rounding makes a token of some thousands another one: so large a share of the answers, or so few, may differ by it.
ROUNDED, FEW = 0.03, 3
# Tokens of past prompts that a server keeps: so few that they are there before its memory is judged.
KEPT = 2048
# Seconds between two looks at memory.
LOOK = 5.0
# (what a request asks of softmeet, the most tokens of it)
ASKED: list[tuple[dict[str, Any], int]] = [
    ({"rule": "logit-mean"}, 40), ({"rule": "prob-mean"}, 40), ({}, 24), ({"gate": "none"}, 8), ({"trust": 4}, 8),
    ({"trust": 30}, 4), ({"rule": "logit-mean", "gate": "unsure:0.5"}, 24), ({"gate": "disagreement:0.1"}, 16),
    ({"gate": "disagreement:0.3"}, 16), ({"rule": "max-entropy"}, 2), ({"weights": [0.5, 0.25, 0.25]}, 16),
]  # fmt: skip
# The same of members whose heads are not read.
AVERAGED: list[tuple[dict[str, Any], int]] = [
    ({"rule": "logit-mean"}, 40), ({"rule": "prob-mean"}, 40), ({}, 24), ({"rule": "power-mean"}, 24),
    ({"rule": "logit-mean", "gate": "unsure:0.5"}, 24), ({"rule": "logit-mean", "weights": [0.75, 0.25]}, 16),
]  # fmt: skip


def requests(families: bool = True) -> list[dict[str, Any]]:
    """The seeded requests, which no end of a text ends: of every rule on both families, or of averages of members."""
    found, every = [], ASKED if families else AVERAGED
    for k in range(4 * len(every)):
        asked, most = every[k % len(every)]
        family = "wide" if "weights" in asked or k % 2 else "narrow"
        found.append({
            "prompt": PROMPTS[k % len(PROMPTS)], "max_tokens": 1 + k * 7 % most, "seed": k, "logprobs": 0,
            **({"model": family, "logit_bias": {"0": -100}} if families else {"ignore_eos": True}),
            "softmeet": asked | {"statuses": True},
        })  # fmt: skip
    return found


@dataclass
class Answer:
    """An answer's tokens with their log-probabilities, how it ended, and the seconds between its chunks."""

    tokens: list[str] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    end: str = ""
    by_time: bool = False
    gaps: list[float] = field(default_factory=list)

    def add(self, document: dict[str, Any]) -> None:
        """Add a chunk, or a whole document."""
        if "error" in document:
            self.end = f"error event: {document['error'].get('code')}"
            return
        for choice in document["choices"]:
            # Where time ended a solver's work, the answer is not the seed's alone.
            self.by_time |= "BUDGET" in choice.get("softmeet", {}).get("statuses", {})
            listed = choice.get("logprobs") or {"tokens": [], "token_logprobs": []}
            self.tokens += listed["tokens"]
            self.log_probs += listed["token_logprobs"]
            self.end = choice["finish_reason"] or self.end


async def answer(
    client: httpx.AsyncClient, fields: dict[str, Any], *, stream: bool, pause: float = 0.0, leave: int = -1
) -> Answer:
    """The answer to a request; a stream's reader may pause after each chunk, and leave after some."""
    found = Answer()
    if not stream:
        response = await client.post("/v1/completions", json=fields)
        found.end = f"status {response.status_code} {response.text}"
        if response.status_code == 200:
            found.add(response.json())
        return found
    async with client.stream("POST", "/v1/completions", json=fields | {"stream": True}) as response:
        if response.status_code != 200:
            return Answer(end=f"status {response.status_code} {(await response.aread()).decode()}")
        done, before = False, 0.0
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                now = time.monotonic()
                found.gaps += [now - before] if before else []
                found.add(json.loads(line[6:]))
                leave -= 1
                if leave == 0:
                    return Answer(end="left")
                await asyncio.sleep(pause)
                before = time.monotonic()
            done |= line == "data: [DONE]"
    return found if done else Answer(end="ended in silence")


class Soak:
    """The load on some sites, and what came of it: counts by kind of request and outcome, and what is a breach."""

    def __init__(
        self, sites: list[Site], seed: int = 0, *,
        reproducible: bool = False, families: bool = True, patience: float = PATIENCE,
    ) -> None:  # fmt: skip
        self.sites, self.until, self.seed, self._strict = sites, 0.0, seed, reproducible
        self._patience = patience
        # Of other members a batch may change tokens.
        self._compared = families
        self.seen: Counter[tuple[str, str]] = Counter()
        self.breaches: list[str] = []
        self.gaps: list[float] = []
        self.tokens = 0
        self._requests = requests(families)
        self.alone: list[Answer] = []

    @property
    def is_over(self) -> bool:
        """Whether no new request is to begin."""
        return time.monotonic() > self.until

    async def ask_alone(self, site: Site) -> None:
        """Ask every seeded request while the server is idle."""
        async with httpx.AsyncClient(base_url=site.url, timeout=self._patience) as client:
            self.alone = [await answer(client, fields, stream=True) for fields in self._requests]
        if bad := [a.end for a in self.alone if a.end != "length"]:
            raise RuntimeError(f"requests that are to be compared failed: {bad}")

    async def client(self, site: Site, number: int) -> None:
        """Ask one request after another, of a kind chosen at random, each with a deadline."""
        generator = random.Random(f"{self.seed} {site.name} {number}")  # noqa: S311
        names, weights = zip(*((kind, weight) for kind, (weight, _) in KINDS.items()), strict=True)
        async with httpx.AsyncClient(base_url=site.url, timeout=httpx.Timeout(self._patience, read=None)) as http:
            while not self.is_over:
                await site.up.wait()
                kind, kills = generator.choices(names, weights)[0], site.kills
                try:
                    async with asyncio.timeout(self._patience):
                        outcome = await KINDS[kind][1](self, http, generator)
                except TimeoutError:
                    outcome = "hung"
                except (httpx.TransportError, OSError) as error:
                    # A process that is killed breaks its connections.
                    outcome = "cut by a kill" if site.kills > kills else f"connection error {type(error).__name__}"
                self.count(kind, outcome)
                await asyncio.sleep(0.5 if outcome == "full" else 0)

    def count(self, kind: str, outcome: str) -> None:
        """Count an outcome, and note it if it may not be."""
        self.seen[kind, outcome] += 1
        fine = ("right", "differs", "ended by time", "left", "refused", "answered", "full", "cut by a kill", "fine")
        if outcome not in fine or (outcome == "differs" and self._strict):
            self.breaches.append(f"{kind}: {outcome}")

    async def seeded(self, http: httpx.AsyncClient, generator: random.Random, **how: Any) -> str:
        """A seeded request, compared with its answer alone."""
        k = generator.randrange(len(self._requests))
        found, alone = await answer(http, self._requests[k], **how), self.alone[k]
        if how["stream"] and not how.get("pause"):
            self.gaps += found.gaps
        self.tokens += len(found.tokens)
        if found.end.startswith(("status 429", "status 503")):
            return "full"
        if found.by_time or alone.by_time:
            return "ended by time"
        if found.end not in ("length", "left"):
            return found.end
        if found.end == "left":
            return "left"
        same = found.tokens == alone.tokens and (not self._strict or found.log_probs == alone.log_probs)
        return "right" if same else "differs"

    async def refused(self, http: httpx.AsyncClient, generator: random.Random) -> str:
        """A malformed request."""
        content, headers = malformed(generator)
        response = await http.post("/v1/completions", content=content, headers=headers)
        is_object = 400 <= response.status_code < 500 and set(response.json()) == {"error"}
        return "refused" if is_object else f"status {response.status_code}"

    async def hostile(self, http: httpx.AsyncClient, generator: random.Random) -> str:
        """A request for as much as it can have."""
        content, headers = json.dumps(hostile(generator)), {"content-type": "application/json"}
        response = await http.post("/v1/completions", content=content, headers=headers)
        if response.status_code in (429, 503):
            return "full"
        return {200: "answered", 400: "refused", 404: "refused", 413: "refused", 422: "refused"}.get(
            response.status_code, f"status {response.status_code}"
        )

    async def looks(self, http: httpx.AsyncClient, generator: random.Random) -> str:
        """A look at one of the pages that need no model."""
        path = generator.choice(["/health", "/ready", "/metrics", "/v1/models", "/openapi.json", "/"])
        response = await http.get(path)
        fine = response.status_code == 200 or (path == "/ready" and response.status_code == 503)
        return "fine" if fine else f"status {response.status_code}"

    async def half_open(self, http: httpx.AsyncClient, generator: random.Random) -> str:
        """A connection over which a part of a request comes, or a stream begins, and that stays for a while."""
        url = http.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        body = json.dumps({"prompt": "a", "max_tokens": 50, "stream": True, "softmeet": {"rule": "logit-mean"}})
        lines = ["POST /v1/completions HTTP/1.1", f"Host: {url.host}", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        whole = (head + body).encode()
        writer.write(whole[: generator.choice([0, 20, len(head), len(whole) - 5, len(whole)])])
        await writer.drain()
        await asyncio.wait([asyncio.ensure_future(reader.read(200))], timeout=generator.choice([0.05, 2, 15]))
        writer.close()
        return "left"

    async def kills(self, site: Site, every: float) -> None:
        """Kill a site's process at random times, ``every`` so many seconds on average, and start another."""
        generator = random.Random(self.seed)  # noqa: S311
        while True:
            await asyncio.sleep(max(0.0, min(generator.uniform(0.5, 1.5) * every, self.until - time.monotonic())))
            if self.is_over:
                return
            await site.kill()
            await site.start()

    async def fuzzes(self, site: Site) -> None:
        """Send what schemathesis makes of the site's OpenAPI document, round after round."""
        number = 0
        while not self.is_over:
            found = await asyncio.to_thread(fuzz, site.url, 5, self.seed + number, lambda: self.is_over, self._patience)
            number += 1
            for outcome, count in found.items():
                self.seen["schemathesis", outcome] += count
            if found["wrong"]:
                self.breaches.append(f"schemathesis, round {number}: {found['wrong']} wrong")

    async def watch(self, started: float) -> None:
        """Note memory, and print a line every minute."""
        minute = 0
        while not self.is_over:
            for site in self.sites:
                await site.look()
            if (now := time.monotonic() - started) >= 60 * (minute + 1):
                minute += 1
                sizes = ", ".join(
                    f"{s.name} {s.memory[-1][-1][1]:.0f} of {s.memory[-1][-1][2]:.0f} MB"
                    for s in self.sites
                    if s.memory[-1]
                )
                typer.echo(
                    f"minute {minute}: {sum(self.seen.values()):,} requests, {self.tokens / now:.0f} tokens/s, "
                    f"{sum(s.kills for s in self.sites)} kills, {self.outcomes()['differs']} differ, "
                    f"{len(self.breaches)} breaches, {sizes}"
                )
            await asyncio.sleep(LOOK)

    def outcomes(self) -> Counter[str]:
        """Counts of outcomes, of all kinds together."""
        found: Counter[str] = Counter()
        for (_, outcome), count in self.seen.items():
            found[outcome] += count
        return found

    def judge(self) -> None:
        """Note what only the whole run shows."""
        for site in self.sites:
            grown, sizes = site.growth(), [mb for life in site.memory for _, mb, _ in life]
            if grown is not None and grown > GROWTH * float(np.median(sizes)):
                self.breaches.append(f"memory of {site.name}: {grown:.0f} MB an hour more")
            if site.tracebacks:
                self.breaches.append(f"{site.name} printed a traceback")
        found = self.outcomes()
        if self._compared and found["differs"] > max(FEW, ROUNDED * (found["right"] + found["differs"])):
            self.breaches.append(f"{found['differs']} answers differ, more than rounding explains")

    def facts(self) -> dict[str, Any]:
        """Everything that was seen, as JSON has it."""
        gaps = self.gaps or [math.nan]
        return {
            "requests": sum(self.seen.values()), "compared tokens": self.tokens, "outcomes": dict(self.outcomes()),
            "kills": sum(s.kills for s in self.sites), "breaches": self.breaches,
            "seconds between chunks": {
                "median": quantile(gaps, 0.5), "99 %": quantile(gaps, 0.99), "largest": max(gaps),
            },
            "growth, MB an hour": {s.name: s.growth() for s in self.sites},
            "memory": {s.name: s.memory for s in self.sites},
        }  # fmt: skip


Kind = Callable[[Soak, httpx.AsyncClient, random.Random], Awaitable[str]]
# (how often, what is done) by name.
KINDS: dict[str, tuple[float, Kind]] = {
    "stream": (8, lambda s, http, g: s.seeded(http, g, stream=True)),
    "whole": (4, lambda s, http, g: s.seeded(http, g, stream=False)),
    "slow reader": (1, lambda s, http, g: s.seeded(http, g, stream=True, pause=g.choice([0.05, 0.5]))),
    "cancel": (2, lambda s, http, g: s.seeded(http, g, stream=True, leave=g.randint(1, 4))),
    "half open": (2, Soak.half_open),
    "malformed": (6, Soak.refused),
    "hostile": (1, Soak.hostile),
    "look": (2, Soak.looks),
}


async def soaked(
    seconds: float,
    clients: int,
    kill_every: float,
    seed: int,
    *,
    reproducible: bool,
    members: list[str],
    patience: float = PATIENCE,
) -> Soak:
    """Start both servers, and load them for so many seconds."""
    given = [word for one in members for word in ("-m", one)] or ["wide", "narrow"]
    given += ["--threads", "1", "--batch", "16", "--queue", "32", "--keep-tokens", str(KEPT)]
    given += ["--reproducible"] * reproducible
    steady, mortal = sites = [Site(name, given) for name in ("steady", "killed")]
    try:
        await asyncio.gather(*(site.start() for site in sites))
        soak = Soak(sites, seed, reproducible=reproducible, families=not members, patience=patience)
        started = time.monotonic()
        await soak.ask_alone(steady)
        typer.echo(f"{len(soak.alone)} requests answered alone in {time.monotonic() - started:.0f} s; the load begins")
        started = time.monotonic()
        soak.until = started + seconds
        await asyncio.gather(
            *(soak.client(site, k) for site in sites for k in range(clients)),
            soak.kills(mortal, kill_every), soak.fuzzes(steady), soak.watch(started),
        )  # fmt: skip
        await asyncio.gather(*(site.end() for site in sites))
    finally:
        for site in sites:
            site.give_up()
    soak.judge()
    return soak


def rows(soak: Soak) -> list[dict[str, Any]]:
    """A line for each kind of request and outcome, and for the memory of each tenth of the steady server's life."""
    found = [{"what": kind, "outcome": end, "number": n} for (kind, end), n in sorted(soak.seen.items())]
    parts = [part for part in np.array_split(np.array(soak.sites[0].memory[0]), 10) if len(part)]
    return found + [
        {"what": f"memory after {p[-1, 0]:.0f} s", "outcome": f"MB {kind}", "number": float(p[-1, k])}
        for p in parts
        for k, kind in ((1, "allocated"), (2, "resident"))
    ]


def main(
    hours: Annotated[float, typer.Option()] = 1.0,
    minutes: Annotated[float | None, typer.Option(help="In place of hours.")] = None,
    clients: Annotated[int, typer.Option(help="Of each server.")] = 12,
    kill_every: Annotated[float, typer.Option(help="Seconds between two kills, on average.")] = 180,
    seed: Annotated[int, typer.Option()] = 0,
    members: Annotated[
        list[str], typer.Option("--member", "-m", help="Serve these by averages, in place of the bundled families.")
    ] = [],  # noqa: B006 - typer makes the list
    patience: Annotated[float, typer.Option(help="Seconds after which an answer counts as never coming.")] = PATIENCE,
    reproducible: Annotated[
        bool, typer.Option(help="Start the servers with this flag; then no bit may differ.")
    ] = False,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Print a line every minute, and a table; exit code 1 after any breach."""
    seconds = 3600 * hours if minutes is None else 60 * minutes
    soak = asyncio.run(
        soaked(seconds, clients, kill_every, seed, reproducible=reproducible, members=members, patience=patience)
    )
    facts = soak.facts()
    show("soak", rows(soak), json_to, seconds=seconds, clients=clients, reproducible=reproducible, **facts)
    print({name: x for name, x in facts.items() if name not in ("memory", "breaches")})
    for breach, count in Counter(soak.breaches).items():
        typer.echo(f"BREACH {count}×: {breach}", err=True)
    raise typer.Exit(bool(soak.breaches))


if __name__ == "__main__":
    typer.run(main)
