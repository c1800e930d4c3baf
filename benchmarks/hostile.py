"""What one client can do to the others: python benchmarks/hostile.py

A stream is measured alone, and then beside one stream of each hostile kind, without a break: its seconds between two
tokens, their median and their largest, and the ratio of medians. The server has a process of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer

from report import show
from servers import Server

# The streams that are measured, by name: fields under ``softmeet``.
MEASURED: dict[str, dict[str, Any]] = {
    "logit-mean": {"rule": "logit-mean"}, "meet": {"rule": "meet"}, "meet, trust 20": {"trust": 20},
}  # fmt: skip
_ENDLESS = {"logit_bias": {"0": -100}}
HOSTILE: dict[str, dict[str, Any]] = {
    "meet, trust 100": {"softmeet": {"rule": "meet", "trust": 100, "gate": "none"}},
    "meet, trust 100, another trust for each token": {"softmeet": {"rule": "meet", "gate": "none"}},
    "max-entropy": {"softmeet": {"rule": "max-entropy"}},
    "least-squares": {"softmeet": {"rule": "least-squares"}},
    "min-underestimation": {"softmeet": {"rule": "min-underestimation"}},
    "min-cross-entropy": {"softmeet": {"rule": "min-cross-entropy"}},
    "min-reverse-cross-entropy": {"softmeet": {"rule": "min-reverse-cross-entropy"}},
    "min-squared-cross-entropy": {"softmeet": {"rule": "min-squared-cross-entropy"}},
    "16 choices of meet, trust 100": {"n": 16, "softmeet": {"rule": "meet", "trust": 100, "gate": "none"}},
    "16 choices of the same settings": {"n": 16},
    "a scored prompt of meet": {"echo": True, "logprobs": 20, "softmeet": {"rule": "meet", "trust": 100, "report": 20}},
    "16 choices with reports": {"n": 16, "logprobs": 20, "softmeet": {"rule": "logit-mean", "report": 20}},
    "16 choices with 1,024 biases": {
        "n": 16,
        "softmeet": {"rule": "logit-mean"},
        "logit_bias": {str(k): -1 for k in range(1024)},
    },
    "long prompts": {"max_tokens": 1, "softmeet": {"rule": "logit-mean"}},
}


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


async def measure(url: str, kinds: list[str], tokens: int, repeats: int) -> list[dict[str, Any]]:
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


def by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each hostile kind, with the gaps of every stream beside it."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = found.setdefault(row["beside"], {"beside": row["beside"]})
        own |= {row["stream"]: row["over alone"], f"{row['stream']}, ms": row["median gap, ms"]}
        own |= {f"{row['stream']}, largest": row["largest gap, ms"]}
    return list(found.values())


def _row(measured: str, kind: str, alone: list[float], found: list[float], seen: list[Any]) -> dict[str, Any]:
    refused = next((entry for entry in seen if isinstance(entry, str)), "")
    counts: dict[str, int] = {}
    for entry in seen:
        for status, count in (entry or {}).items() if isinstance(entry, dict) else ():
            counts[status] = counts.get(status, 0) + count
    return {
        "stream": measured, "beside": kind, "median gap, ms": 1e3 * median(found),
        "over alone": median(found) / median(alone), "largest gap, ms": 1e3 * max(found),
        "hostile tokens": refused or ", ".join(f"{n} {name}" for name, n in counts.items()),
    }  # fmt: skip


def main(
    *,
    family: Annotated[str, typer.Option(help="The bundled family that is served.")] = "wide",
    kinds: Annotated[str, typer.Option(help="Hostile kinds whose names have this part.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of the measured stream, each time.")] = 100,
    repeats: Annotated[int, typer.Option(help="How often it is measured in each company.")] = 3,
    threads: Annotated[int, typer.Option(help="PyTorch threads of the server.")] = 1,
    token_seconds: Annotated[float, typer.Option(help="The server's --token-seconds.")] = 1.0,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure one stream beside one hostile stream of each kind."""
    server = Server(family, "--threads", str(threads), "--token-seconds", str(token_seconds))
    try:
        chosen = [kind for kind in HOSTILE if kinds in kind]
        rows = asyncio.run(measure(server.url, chosen, tokens, repeats))
    finally:
        server.end()
    title = f"one stream beside one hostile stream, {family}: the median gap over that alone, and the largest in ms"
    show(title, by_kind(rows), out, tokens=tokens, repeats=repeats, each=rows)


if __name__ == "__main__":
    typer.run(main)
