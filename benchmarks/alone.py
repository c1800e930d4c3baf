"""What a server gains where requests come one at a time: python benchmarks/alone.py [--threads 2] [-m A -m B]

Each request is answered by several servers' batchers in this process, in turn: one that runs it as in a batch, one that
speculates, one that draws each token from one member, and one whose members run in threads, each on its share of the
cores. Figures are medians over the requests, of milliseconds a token, and of the ratio to the first. *Accepted* is the
share of drafts that were right. With ``--streams 8``, so many requests come together, and only threads can gain.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from price import Drafts
from report import median, named, show
from softmeet.evaluation.held_out import held_out_books
from softmeet.server.answer import AnswerStream
from softmeet.server.ensembles import load
from softmeet.server.schemas import CompletionRequest
from softmeet.server.serving import ServerSettings, Serving

WORDS = 40


def texts(pattern: str | None, count: int) -> list[str]:
    """The beginnings of texts: of files, or of held-out books."""
    files = [] if pattern is None else sorted(Path(pattern).parent.glob(Path(pattern).name))
    whole = [file.read_text(encoding="utf-8") for file in files] or [book.text for book in held_out_books()]
    return [" ".join(whole[k % len(whole)].split()[WORDS * (k // len(whole)) :][:WORDS]) for k in range(count)]


async def answered(serving: Serving, body: dict[str, Any], streams: int) -> float:
    """Milliseconds a token of a stream beyond its first tokens, where as many of one prompt come together."""
    taken = []
    for tokens in (2, body["max_tokens"]):
        prepared = [
            await serving.prepare(CompletionRequest.model_validate(body | {"max_tokens": tokens, "ignore_eos": True}))
            for _ in range(streams)
        ]
        start = time.perf_counter()
        await asyncio.gather(*(AnswerStream(serving.batcher, request).whole() for request in prepared))
        taken.append(time.perf_counter() - start)
    return 1000 * (taken[1] - taken[0]) / (tokens - 2)


def main(
    member: Annotated[list[str] | None, typer.Option("--member", "-m", help="Two or more models.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    text: Annotated[str | None, typer.Option(help="A pattern of files that begin with the prompts.")] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    streams: Annotated[int, typer.Option(help="How many requests come together.")] = 1,
    tokens: Annotated[int, typer.Option()] = 100,
    requests: Annotated[int, typer.Option(help="How many requests, or groups of them.")] = 15,
    threads: Annotated[int, typer.Option()] = 2,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    ensembles = load({"default": member or ["wide"]}, dtype=dtype)
    plain = ServerSettings(ui=False, speculate=0, one_member=False, parallel=False)
    servers = {
        "as in a batch": plain,
        "speculation": replace(plain, speculate="auto"),
        "one member a token": replace(plain, one_member=True),
        "in threads": replace(plain, parallel=True),
    }
    servings, told, rows = {name: Serving(ensembles, settings) for name, settings in servers.items()}, Drafts(), []
    for serving in servings.values():
        serving.start()
    for name in rule or ["logit-mean", "prob-mean"]:
        ways = [way for way in servings if name == "prob-mean" or way != "one member a token"]
        taken = {way: list[float]() for way in ways}
        accepted = {way: list[bool]() for way in ways}
        for k, prompt in enumerate(texts(text, requests + 1)):
            body = {"model": "default", "prompt": prompt, "max_tokens": tokens, "softmeet": {"rule": name}}
            for way in ways:
                found = asyncio.run(answered(servings[way], body, streams))
                drafted = told.taken()
                # The first request warms everything up.
                if k:
                    taken[way].append(found)
                    accepted[way] += drafted
        for way in ways:
            ratios = [x / y for x, y in zip(taken[ways[0]], taken[way], strict=True)]
            drafts = accepted[way]
            rows.append(
                {
                    "members": " + ".join(map(named, member or ["wide"])),
                    "at once": streams,
                    "rule": name,
                    "how": way,
                    "ms a token": median(taken[way]),
                    "times as fast": median(ratios),
                    "accepted": sum(drafts) / len(drafts) if drafts else None,
                }
            )
    for serving in servings.values():
        serving.batcher.close(0)
        serving.batcher.join()
    show(f"{streams} at once", rows, json)


if __name__ == "__main__":
    typer.run(main)
