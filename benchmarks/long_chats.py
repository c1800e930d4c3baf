"""What clients that send much too long texts do to the others: python benchmarks/long_chats.py

One client asks for completions of one token, alone and then beside clients that send 900 kB to an endpoint without a
break: the seconds that its answers take. The server has a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer

from report import show
from servers import Server

_TEXT = ("And the king said unto his daughter, " * 30_000)[:900_000]
_CHAT = [{"role": "user", "content": _TEXT}]
LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "a chat": ("/v1/chat/completions", {"messages": _CHAT, "max_tokens": 1}),
    "a response": ("/v1/responses", {"input": _TEXT, "max_output_tokens": 1}),
    "messages to /tokenize": ("/tokenize", {"messages": _CHAT}),
    "a prompt": ("/v1/completions", {"prompt": _TEXT, "max_tokens": 1}),
    # The last, as the server goes on with it for a while after the clients have left.
    "a response, cut to fit": ("/v1/responses", {"input": _TEXT, "max_output_tokens": 1, "truncation": "auto"}),
}


async def waits(client: httpx.AsyncClient, seconds: float) -> list[float]:
    """Ask for one token again and again, and return the seconds that each answer takes."""
    end, found = time.perf_counter() + seconds, list[float]()
    while time.perf_counter() < end:
        begun = time.perf_counter()
        (await client.post("/v1/completions", json={"prompt": "In the", "max_tokens": 1})).raise_for_status()
        found.append(time.perf_counter() - begun)
        await asyncio.sleep(0.05)
    return found


async def flood(url: str, kind: str, statuses: list[int]) -> None:
    """Send long texts of a kind, one after the other; note the status of each answer."""
    path, body = LONG[kind]
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        while True:
            statuses.append((await client.post(path, json=body)).status_code)


async def measure(url: str, clients: int, seconds: float) -> list[dict[str, Any]]:
    """Measure the answers' seconds alone, and beside clients of each kind; return the rows of the table."""
    rows = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for kind in ("", *LONG):
            statuses: list[int] = []
            floods = [asyncio.create_task(flood(url, kind, statuses)) for _ in range(clients) if kind]
            await asyncio.sleep(1)
            found = await waits(client, seconds)
            for task in floods:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*floods, return_exceptions=True)
            said = ", ".join(f"{statuses.count(status)} of status {status}" for status in sorted(set(statuses)))
            row = {"beside": kind or "nobody", "median, s": median(found), "longest, s": max(found)}
            rows.append(row | {"answers": len(found), "long ones": said})
    return rows


def main(
    *,
    family: Annotated[str, typer.Option(help="The bundled family that is served.")] = "wide",
    clients: Annotated[int, typer.Option(help="Clients that send long texts.")] = 4,
    seconds: Annotated[float, typer.Option(help="How long each company is measured.")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file, as JSON.")] = None,
) -> None:
    """Measure completions of one token beside clients that send 900 kB without a break."""
    server = Server("-m", family, "--threads", "1")
    try:
        rows = asyncio.run(measure(server.url, clients, seconds))
    finally:
        server.end()
    show(f"one token beside {clients} clients that send 900 kB, {family}", rows, out, clients=clients, seconds=seconds)


if __name__ == "__main__":
    typer.run(main)
