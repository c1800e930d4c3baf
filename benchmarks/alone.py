"""A request alone and in a batch, by a server's batcher in this process: how fast, and whether tokens differ."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cells import Run
from price import Drafts
from report import JsonPath, Members, Threads, commands, median, named, show
from softmeet.cli.progress import progress
from softmeet.evaluation.held_out import held_out_books
from softmeet.server.answer import AnswerStream
from softmeet.server.ensembles import Ensembles, load
from softmeet.server.schemas import CompletionRequest
from softmeet.server.sequences import Token
from softmeet.server.serving import ServerSettings, Serving

app = commands(__doc__)
WORDS = 40


def texts(pattern: str | None, count: int) -> list[str]:
    """Return the beginnings of texts: of files, or of held-out books."""
    files = [] if pattern is None else sorted(Path(pattern).parent.glob(Path(pattern).name))
    whole = [file.read_text(encoding="utf-8") for file in files] or [book.text for book in held_out_books()]
    return [" ".join(whole[k % len(whole)].split()[WORDS * (k // len(whole)) :][:WORDS]) for k in range(count)]


async def answered(serving: Serving, body: dict[str, Any], streams: int) -> float:
    """Return milliseconds a token of a stream beyond its first tokens, where as many of one prompt come together."""
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


@app.command()
def speed(
    member: Members = None,
    rule: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    text: Annotated[str | None, typer.Option(help="A pattern of files that begin with the prompts.")] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    streams: Annotated[int, typer.Option(help="How many requests come together.")] = 1,
    tokens: Annotated[int, typer.Option()] = 100,
    requests: Annotated[int, typer.Option(help="How many requests, or groups of them.")] = 15,
    threads: Threads = 2,
    json: JsonPath = None,
) -> None:
    """Time what a server gains where requests come one at a time.

    Each request is answered by several servers' batchers, in turn: one that runs it as in a batch, one that speculates,
    one that draws each token from one member, and one whose members run in threads, each on its share of the cores.
    Figures are medians over the requests, of milliseconds a token, and of the ratio to the first. *Accepted* is the
    share of drafts that were right. With --streams 8, so many requests come together, and only threads can gain.
    """
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
            rows.append({
                "members": " + ".join(map(named, member or ["wide"])), "at once": streams, "rule": name, "how": way,
                "ms a token": median(taken[way]), "times as fast": median(ratios),
                "accepted": sum(drafts) / len(drafts) if drafts else None,
            })  # fmt: skip
    for serving in servings.values():
        serving.batcher.close(0)
        serving.batcher.join()
    show(f"{streams} at once", rows, json)


FAMILIES, RULES = ("wide", "narrow"), ("logit-mean", "prob-mean", "meet")
# The drafts at a turn where requests come one at a time.
_DRAFTS = 4
# The words of a prompt: so many at least and at most.
FEWEST, MOST = 3, 40


def requests(family: str, rule: str, size: int, streams: int, length: int) -> list[CompletionRequest]:
    """Return seeded requests of a part of the comparison, none of which another part has: prompts differ in length."""
    generator = random.Random(f"{family} {rule} {size}")  # noqa: S311
    words = [book.text.split() for book in held_out_books()]
    found = []
    for seed in range(streams):
        book, count = generator.choice(words), generator.randint(FEWEST, MOST)
        start = generator.randrange(len(book) - count)
        given = {"model": family, "prompt": " ".join(book[start : start + count]), "max_tokens": length}
        found.append(
            CompletionRequest.model_validate(given | {"seed": seed, "logprobs": 0, "softmeet": {"rule": rule}})
        )
    return found


async def answers(serving: Serving, asked: Sequence[CompletionRequest], size: int) -> list[list[Token]]:
    """Return each request's tokens, where ``size`` begin together, and the next ones when all of these have ended."""
    found: list[list[Token]] = []
    for start in range(0, len(asked), size):
        prepared = [await serving.prepare(request) for request in asked[start : start + size]]
        streams = [AnswerStream(serving.batcher, request) for request in prepared]
        found += [
            choice.tokens for choices in await asyncio.gather(*(s.whole() for s in streams)) for choice in choices
        ]
    return found


def served(ensembles: Ensembles, asked: Sequence[CompletionRequest], size: int, **settings: Any) -> list[list[Token]]:
    """Return the tokens of :func:`answers` by a batcher of its own, which knows no prompt yet."""
    serving = Serving(ensembles, ServerSettings(ui=False, **settings))
    serving.batcher.start()
    try:
        return asyncio.run(answers(serving, asked, size))
    finally:
        serving.batcher.close(0)
        serving.batcher.join()


def compared(alone: Sequence[Sequence[Token]], together: Sequence[Sequence[Token]]) -> dict[str, Any]:
    """Return counts over pairs of the same request's tokens, and how far apart the drawn tokens' probabilities are."""
    tokens = differing = 0
    apart: list[float] = []
    for one, other in zip(alone, together, strict=True):
        for first, second in zip(one, other, strict=False):
            tokens += 1
            if first.token != second.token:
                differing += 1
                break
            apart.append(abs(math.exp(first.log_prob or 0.0) - math.exp(second.log_prob or 0.0)))
    return {
        "streams": len(alone), "tokens": tokens, "streams that differ": differing,
        "bitwise": sum(x == 0.0 for x in apart), "largest": max(apart), "sum": sum(apart),
    }  # fmt: skip


def cell(
    ensembles: Ensembles, part: tuple[str, str, int], streams: int, length: int, **settings: Any
) -> dict[str, Any]:
    """Return the figures of one family, rule and size of batch."""
    asked = requests(*part, streams, length)
    alone = served(ensembles, asked, 1, speculate=0, **settings)
    # By itself a server leaves requests for log-probabilities, which are compared, to the batch.
    other = {"speculate": _DRAFTS} if part[2] == 1 else {}
    found = compared(alone, served(ensembles, asked, part[2], **other, **settings))
    return {"family": part[0], "rule": part[1], "batch": part[2], **found}


def summed(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of several cells together, for one line of the table."""
    total = {
        name: sum(c[name] for c in cells) for name in ("streams", "tokens", "streams that differ", "bitwise", "sum")
    }
    return {
        "streams": total["streams"], "tokens": total["tokens"], "streams that differ": total["streams that differ"],
        "one token in": total["tokens"] / total["streams that differ"] if total["streams that differ"] else None,
        "probability: same bits": total["bitwise"] / total["tokens"], "mean difference": total["sum"] / total["tokens"],
        "largest": max(c["largest"] for c in cells),
    }  # fmt: skip


@app.command()
def seeds(
    folder: Annotated[Path, typer.Argument(help="Keeps finished parts.")] = Path("seeds"),
    tokens: Annotated[int, typer.Option(help="Of each rule, in all.")] = 20_000,
    sizes: Annotated[str, typer.Option(help="Of batches; 1 for one at a time with drafts.")] = "2,4,8,16,32",
    length: Annotated[int, typer.Option(help="Of an answer, in tokens.")] = 40,
    reproducible: Annotated[bool, typer.Option(help="With the server's setting of this name.")] = False,
    json: JsonPath = None,
) -> None:
    """Count how often a seed's token differs in a batch from the one that the request gets alone.

    The same seeded completions, of places in held-out books: one at a time without speculation, then in batches of 2 to
    32 that begin together; with --sizes 1 one at a time with four drafts at a turn. Tokens are compared up to and
    including the first that differs, since what comes after it continues another text; up to there both are draws from
    the same distribution but for rounding, and the drawn token's probabilities are compared. Finished parts are kept in
    a folder; the same command goes on from there. It is an error if what is reproducible differs.
    """
    torch.set_num_threads(1)
    settings = {"reproducible": True} if reproducible else {}
    each = [int(size) for size in sizes.split(",")]
    streams = -(-tokens // (len(FAMILIES) * len(each) * length))
    run = Run(folder, {"streams": streams, "length": length, **settings})
    ensembles = load({family: [family] for family in FAMILIES})
    parts = [(family, rule, size) for family in FAMILIES for rule in RULES for size in each]
    with progress() as begin:
        advance = begin("parts", 0, len(parts))
        calls = {" ".join(map(str, p)): partial(cell, ensembles, p, streams, length, **settings) for p in parts}
        found = list(run.each(calls, on_done=lambda key: advance(1)).values())
    rows = []
    for rule in RULES:
        own = [c for c in found if c["rule"] == rule]
        rows += [{"rule": rule, "of": f, **summed([c for c in own if c["family"] == f])} for f in FAMILIES]
        rows += [{"rule": rule, "of": f"batches of {n}", **summed([c for c in own if c["batch"] == n])} for n in each]
        rows.append({"rule": rule, "of": "all", **summed(own)})
    every = {f"batches of {n}": [c for c in found if c["batch"] == n] for n in each} | {"all": found}
    rows += [{"rule": "all rules", "of": name, **summed(cells)} for name, cells in every.items()]
    show("a seed's tokens in a batch, and alone", rows, json, **run.settings)
    if reproducible and any(c["streams that differ"] or c["largest"] for c in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
