"""``softmeet check --plan``: what goes where, as a table or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softmeet.cli import options


def show_plan(members: list[str], batch: int, context: int | None, *, as_json: bool, **loading: Any) -> None:
    """Print the plan of some members, or of a saved ensemble's."""
    with options.status("reading configurations"):
        from softmeet.ensemble import member_names
        from softmeet.hf.plan import plan

        named = member_names(members[0] if len(members) == 1 else members)
        found = plan(named, batch=batch, context=context, **loading)
    if as_json:
        parts = [asdict(part) for part in found.parts]
        typer.echo(json.dumps(asdict(found) | {"parts": parts, "totals": found.totals()}, indent=2))
        return
    title = f"{found.batch} sequences of {found.context:,} tokens; {found.rows_at_once} positions solved at once"
    table = Table("", "what", "where", "dtype", "MB", title=title)
    for part in found.parts:
        table.add_row(
            escape(options.short(part.owner) if Path(part.owner).parts else part.owner),
            part.what, part.device, part.dtype, f"{part.bytes / 1e6:,.2f}",
        )  # fmt: skip
    table.add_section()
    for place, size in found.totals().items():
        table.add_row("together", "", place, "", f"{size / 1e6:,.2f}")
    console = Console()
    console.print(table)
    for name, size in found.cache_bytes_per_token.items():
        console.print(f"{escape(options.short(name))} keeps {size / 1e3:,.1f} kB for each token of a sequence.")
    console.print("Beside this come Python with its libraries, some 500 MB, and activations while a prompt is run.")
