"""``softmeet check --plan``: what an ensemble takes of memory, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from softmeet.cli import options
from softmeet.cli.progress import working
from softmeet.cli.tables import counted, out, print_table
from softmeet.startup import quick_imports, uncollected


def facts(members: list[str], batch: int, context: int | None, loading: options.LoadingFlags) -> dict[str, Any]:
    """Return which weights, caches and buffers go on which device, and their sizes in bytes, without loading weights.

    Args:
        members: the members' names, or one saved ensemble or bundled family.
        batch: the number of sequences at once.
        context: the number of tokens of each; None for the shortest context.
        loading: the flags for dtype and devices.
    """
    with working("reading configurations"):
        with uncollected(), quick_imports():
            from softmeet.ensemble import member_names
            from softmeet.hf.plan import plan

        where = {name: loading.arguments()[name] for name in ("dtype", "device", "trust_remote_code")}
        named = member_names(members[0] if len(members) == 1 else members)
        found = plan(named, batch=batch, context=context, **where)
    return asdict(found) | {"totals": found.totals()}


def show(facts: dict[str, Any]) -> None:
    """Print a plan as a table, with sizes in MB."""
    title = f"{counted(facts['batch'], 'sequence')} of {facts['context']:,} tokens"
    if any(part["owner"] == "solver" for part in facts["parts"]):
        title += f"; {counted(facts['rows_at_once'], 'token')} solved at once"
    parts = [
        (options.short(p["owner"]) or p["owner"], p["what"], p["device"], p["dtype"], f"{p['bytes'] / 1e6:,.2f}")
        for p in facts["parts"]
    ]
    totals = [("together", "", place, "", f"{size / 1e6:,.2f}") for place, size in facts["totals"].items()]
    console, columns = out(), ("member", "what", "where", "dtype", "MB")
    print_table(console, columns, [parts, totals], title=title, texts=(0, 1, 2, 3))
    for name, size in facts["cache_bytes_per_token"].items():
        console.print(f"{options.short(name)} keeps {size / 1e3:,.1f} kB for each token of a sequence.")
    console.print("Beside this come Python with its libraries, some 500 MB, and activations while a prompt is run.")
