"""``softmeet trace``: run the members over a text once, and keep what every rule needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from softmeet.cli import engines, options, texts
from softmeet.cli.config import Config


def trace(
    out: Annotated[Path, typer.Argument(help="The folder of the trace; the same command goes on where it stopped.")],
    text: texts.Text = None,
    members: texts.Members = None,
    separator: texts.Separator = None,
    column: texts.Column = "text",
    window: texts.Window = None,
    stride: texts.Stride = None,
    bos: texts.Bos = False,
    max_tokens: texts.MaxTokens = None,
    max_per_document: texts.MaxPerDocument = None,
    store: Annotated[str, typer.Option(help="float32, or float16 for half the size.")] = "float32",
    shard: Annotated[int, typer.Option(min=1, help="Positions in one file, at least.")] = 4096,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.RemoteCode = False,
    engine: engines.Name = "local",
    workers: engines.Workers = None,
    threads: engines.Threads = 1,
    ray_address: engines.Address = None,
    gpus: engines.Gpus = 0.0,
    config: Config = None,
) -> None:
    """Run every member over a text once and keep its hidden states, for softmeet evaluate and softmeet fit."""
    texts.require_extra(pyarrow=True)
    texts.require_places(None, out)
    found = texts.documents(text, separator, column)
    ensemble = options.load_ensemble(members, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    from softmeet.evaluation.trace import record

    with (
        options.stoppable(f"whole shards stay in {out}; the same command goes on from there"),
        engines.engine(engine, ensemble, workers, threads, ray_address, gpus) as running,
        texts.progress() as begin,
    ):
        bars: list[Callable[[int], None]] = []
        made = record(
            ensemble,
            found,
            out,
            window=window,
            stride=stride,
            bos=bos,
            max_tokens=max_tokens,
            max_per_document=max_per_document,
            dtype=store,  # type: ignore[arg-type]  # checked there
            shard_size=shard,
            engine=running,
            on_start=lambda done, total: bars.append(begin("tracing", done, total)),
            on_progress=lambda count: bars[0](count),
            on_damage=options.say,
        )
    facts = made.facts
    size = sum(made.shard(k).stat().st_size for k in range(len(facts["shards"])))
    typer.echo(
        f"{out}: {sum(facts['shards']):,} positions of {len(facts['documents']):,} documents in windows of "
        f"{facts['window']} tokens, {facts['stride']} apart; {len(facts['shards'])} shards, {size / 1e6:,.1f} MB"
    )
    if error := made.float16_error():
        typer.echo(
            f"float16 moves a target's log-probability by {error['mean']:.1e} nats on average, "
            f"{error['largest']:.1e} at most"
        )
