"""``softmeet inspect``: a text token by token, coloured by how far the members had to be corrected."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape as markup
from rich.table import Table
from rich.text import Text

from softmeet.cli import options
from softmeet.cli.config import Config
from softmeet.cli.flags import flags

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.hf import TokenReport


@flags()
def inspect(
    *,
    text: Annotated[str, typer.Argument(help="The text to look into; every token but the first is predicted.")],
    members: options.Members = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens to list of each distribution.")] = 5,
    loading: options.Loading,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page to this file.")] = None,
    **settings: Any,
) -> None:
    """Show what each member and the ensemble expected at every token of a text, and what moved."""
    ensemble = loading.ensemble(members, settings)
    reports = ensemble.inspect(text, top)
    facts = _facts(ensemble, text, reports)
    if html is not None:
        html.write_text(_page(facts), encoding="utf-8")
        options.err.print(f"written to {html}")
    if as_json:
        # JSON has no infinity: null where nothing is known of the gap.
        tokens = [t | {"gap": t["gap"] if math.isfinite(t["gap"]) else None} for t in facts["tokens"]]
        typer.echo(json.dumps(facts | {"tokens": tokens}, ensure_ascii=False, indent=2))
    elif html is None:
        _show(facts)


def _facts(ensemble: Ensemble, text: str, reports: list[TokenReport]) -> dict[str, Any]:
    tokens = [report.spelled(ensemble.tokenizer) for report in reports]
    names = [options.short(name) for name in ensemble.names]
    first = str(ensemble.tokenizer.decode([ensemble.tokenizer(text)["input_ids"][0]]))
    nats = -sum(report.log_prob for report in reports) / len(reports)
    gated = sum(report.gated for report in reports) / len(reports)
    config = ensemble.model.config
    facts = {"members": names, "rule": config.rule, "gate": config.gate, "gated": gated}
    return facts | {"first": first, "nats": nats, "tokens": tokens}


def _show(facts: dict[str, Any]) -> None:
    from softmeet.hf.report import heat, shown

    console, line = Console(), Text(facts["first"])
    for token in facts["tokens"]:
        hot = heat(token["disagreement"])
        line.append(token["text"], style=f"on rgb({int(40 + 180 * hot)},{int(70 * (1 - hot))},40)" if hot else "")
    console.print(line)
    names = map(markup, facts["members"])
    table = Table("token", "ensemble", *names, "disagreement", "what moved: token pool → answer")
    for token in facts["tokens"]:
        moved = "  ".join(
            f"{markup(shown(text))} {math.exp(before):.1%}→{math.exp(after):.1%}"
            for text, before, after in token["moved"][:2]
        )
        bound = "≤" if all(token["disagreement_is_bound"]) else ""
        table.add_row(
            markup(shown(token["text"])),
            f"{math.exp(token['log_prob']):.2%}",
            *(f"{math.exp(x):.2%}" for x in token["member_log_probs"]),
            f"{bound}{sum(token['disagreement']):.3f}",
            moved,
        )
    console.print(table)
    console.print(
        f"rule {facts['rule']}: {facts['nats']:.3f} nats a token; disagreement in nats, summed over members"
        + (f"; gate {facts['gate']} closed at {facts['gated']:.1%} of the tokens" if facts["gate"] else "")
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>softmeet: {rule}</title><style>
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
p.text {{ white-space: pre-wrap; font-family: ui-monospace, monospace; }}
p.text a {{ color: inherit; text-decoration: none; border-radius: 3px; }}
section {{ border-top: 1px solid #ddd; padding: .5rem 0; }} section:target {{ background: #f4f7ff; }}
table {{ border-collapse: collapse; font-size: 14px; }} td, th {{ padding: .1rem .7rem .1rem 0; text-align: left; }}
code {{ background: #eee; border-radius: 3px; padding: 0 .2rem; white-space: pre; }}
</style></head><body>
<h1>softmeet: {rule}</h1>
<p>{members}. {nats:.3f} nats a token.{gate} A token is the redder, the more nats the members had to be corrected by;
click one.</p>
<p class="text">{first}{spans}</p>
{sections}
</body></html>
"""


def _page(facts: dict[str, Any]) -> str:
    from softmeet.hf.report import heat

    spans, sections = [], []
    for k, token in enumerate(facts["tokens"]):
        color = f"background: rgba(220, 60, 40, {heat(token['disagreement']):.2f})"
        spans.append(f'<a href="#t{k}" style="{color}">{escape(token["text"])}</a>')
        sections.append(_section(k, token, facts["members"]))
    return _PAGE.format(
        rule=escape(facts["rule"]),
        members=escape(", ".join(facts["members"])),
        nats=facts["nats"],
        gate=f" Gate {facts['gate']}: closed at {facts['gated']:.1%} of the tokens." if facts["gate"] else "",
        first=escape(facts["first"]),
        spans="".join(spans),
        sections="\n".join(sections),
    )


def _section(k: int, token: dict[str, Any], members: list[str]) -> str:
    from softmeet.hf.report import shown

    def listed(rows: list[list[Any]]) -> str:
        return " ".join(f"<code>{escape(shown(text))}</code>&nbsp;{math.exp(x):.1%}" for text, x in rows)

    rows = [f"<tr><th>ensemble<td>{math.exp(token['log_prob']):.2%}<td><td>{listed(token['top'])}"]
    for name, own, nats, bound, top in zip(
        members, token["member_log_probs"], token["disagreement"], token["disagreement_is_bound"], token["member_top"],
        strict=True,
    ):  # fmt: skip
        size = f"{'≤' if bound else ''}{nats:.4f} nats"
        rows.append(f"<tr><th>{escape(name)}<td>{math.exp(own):.2%}<td>{size}<td>{listed(top)}")
    moved = ", ".join(
        f"<code>{escape(shown(text))}</code> {math.exp(before):.2%} → {math.exp(after):.2%}"
        for text, before, after in token["moved"]
    )
    sure = f"gap {'at most' if token['gap_is_certified'] else 'about'} {token['gap']:.1e} nats"
    sure = sure if math.isfinite(token["gap"]) else "gap unknown"
    return (
        f'<section id="t{k}"><h3><code>{escape(shown(token["text"]))}</code></h3><table>{"".join(rows)}</table>'
        f"<p>Moved, from the pool to the answer: {moved}.<br>{token['status'].lower()}, {sure}, "
        f"{token['num_passes']:.1f} head passes{', gate closed' if token['gated'] else ''}.</p></section>"
    )
