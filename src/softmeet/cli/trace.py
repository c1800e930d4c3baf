"""``softmeet trace``: run the members over a text once, and store the hidden states that rules are computed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from softmeet.cli import options, texts
from softmeet.cli.flags import argument, flag, flags
from softmeet.cli.messages import say, stoppable
from softmeet.cli.progress import progress
from softmeet.cli.terminal import harmless
from softmeet.evaluation.record import repeats
from softmeet.members.files import TRACED, refuse_files
from softmeet.rules.frozen import unknown


@flags()
def trace(
    *,
    out: Path = argument("The folder of the trace; run the same command again to resume.", default=...),
    members: options.Members = None,
    source: texts.TextFlags,
    store: str = flag(
        "float32", "The type of the stored numbers: float32, or float16 for half the size.", panel="Output"
    ),
    loading: options.LoadingFlags,
    running: options.EngineFlags,
) -> None:
    """Save what models predict for a text, to try ways of mixing by softmeet evaluate and softmeet fit.

    For each predicted token its hidden states are stored, as many numbers as the widths of all members' heads add up
    to: for widths 896 and 1536, 2432 numbers, about 10 kB.

    Example: softmeet trace my-trace -m wide/gpt2 -m wide/llama --text 'books/*.txt'
    """
    texts.require_places(None, out)
    if store not in ("float32", "float16"):
        raise unknown(f"cannot store numbers as {store!r}", store, ["float32", "float16"])
    found = source.documents()
    who = options.named(members)
    refuse_files(who, TRACED)
    loading.refuse_exact(who, [document.text for document in found], source.surely_read)
    ensemble = loading.ensemble(who, prune=options.MEASURED)
    from softmeet.evaluation.trace import record

    tracing = f"reading the text, in {ensemble.model.config.vocabulary}"
    kept = stoppable(f"whole documents stay in {out}; the same command goes on from there")
    with kept, running.start(ensemble) as engine, progress() as begin:
        bars: list[Any] = []
        made = record(
            ensemble,
            found,
            out,
            **source.windowing,
            dtype=store,  # type: ignore[arg-type]  # checked there
            engine=engine,
            on_start=lambda done, total: bars.append(begin(tracing, done, total)),
            on_progress=lambda count: bars[0](count),
            on_damage=say,
        )
    facts = made.facts
    size = sum(made.document(k).stat().st_size for k in range(len(made.sizes)))
    typer.echo(
        f"{harmless(str(out))}: {sum(made.sizes):,} positions of {len(made.sizes):,} documents in "
        f"windows of {facts['window']} tokens, {facts['stride']} apart; {size / 1e6:,.1f} MB"
    )
    for line in repeats(ensemble.names):
        typer.echo(line)
    if error := made.float16_error():
        typer.echo(
            f"float16 moves a target's log-probability by {error['mean']:.1e} nats on average, {error['largest']:.1e} "
            f"at most"
        )
