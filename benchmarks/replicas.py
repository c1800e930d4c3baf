"""One server beside replicas of it on Ray Serve: python benchmarks/replicas.py

Tokens a second and time to the first token by `logit-mean`, and what a token costs: the CPU of all processes of the
server, and that of Ray's proxy, which all replicas share. CPU seconds hold on a machine that also has
other work to do; rates and times do not.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from report import show
from serve import measure
from servers import Server

PROXY = "ray::ProxyActor"


def seconds(server: Server, *names: str) -> float:
    """Of CPU, of the server's processes that are called so; of all without names."""
    server_process = psutil.Process(server.process.pid)
    found = [server_process, *server_process.children(recursive=True)]
    own = [p.cpu_times() for p in found if not names or " ".join(p.cmdline()).startswith(names)]
    return float(sum(x.user + x.system for x in own))


def main(
    family: Annotated[str, typer.Argument(help="A bundled family.")] = "narrow",
    streams: Annotated[int, typer.Option(help="At once.")] = 32,
    tokens: Annotated[int, typer.Option(help="Of each answer.")] = 100,
    replicas: Annotated[str, typer.Option(help="Numbers of replicas.")] = "1,2",
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    more: dict[str, Any] = {
        "softmeet": {"rule": "logit-mean"},
        "stream_options": {"include_usage": True},
        "logit_bias": {"0": -100},
    }
    kinds = [("one process", ["--threads", "1"])]
    kinds += [(f"replicas: {n}", ["--replicas", n]) for n in replicas.split(",")]
    rows: list[dict[str, Any]] = []
    for name, arguments in kinds:
        server = Server(f"default={family}", "--batch", str(streams), *arguments)
        try:
            before, all_before = seconds(server, PROXY), seconds(server)
            found = asyncio.run(measure(server.url, streams, tokens, **more))
            spent, everything = seconds(server, PROXY) - before, seconds(server) - all_before
        finally:
            server.end()
        passing, whole = (1e3 * x / (streams * tokens) if x else None for x in (spent, everything))
        costs = {"ms of CPU a token": whole, "of it proxy": passing}
        rows.append({"server": name} | found | costs)
    show(f"{family}, logit-mean, {streams} streams of {tokens} tokens", rows, json_to)


if __name__ == "__main__":
    typer.run(main)
