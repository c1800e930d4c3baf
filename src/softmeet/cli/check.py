"""``softmeet check``: what kind of ensemble some members make, before any is generated from."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softmeet.cli import options
from softmeet.cli.config import Config
from softmeet.cli.flags import flag, flags
from softmeet.cli.old_forms import warn

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble


@dataclass
class Planning:
    """What goes where, instead of what kind of ensemble it is."""

    plan: bool = flag(False, "Instead say what goes where, in bytes, without loading any weights.", "--plan")
    batch: int = flag(1, "Of the plan: sequences at once.", min=1)
    context: int | None = flag(None, "Of the plan: tokens of each.", min=1, shown="the shortest context")


@flags(only=("weights", "pool"))
def check(
    *,
    named: Annotated[list[str] | None, typer.Argument(hidden=True, help="An old form: say -m for each.")] = None,
    members: options.Members = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="Held-out text: is the softmax to blame? Over bytes: how do members cut it, and at what cost?",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="Of the text, at most; over bytes four times as many bytes.")
    ] = 512,
    sampled: Annotated[
        int, typer.Option(min=0, help="Without a text: tokens that the ensemble samples, to see how far meet moves it.")
    ] = 64,
    planning: Planning,
    loading: options.Loading,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    **settings: Any,
) -> None:
    """Compare members: vocabularies, heads, the angles between them, memory, and whom to trust.

    Where tokenizers differ: what tokens they share, and, on a text, how alike they cut it and what reading it costs.
    """
    if named:
        warn("naming members without an option", f"say {' '.join(f'-m {name}' for name in named)}")
    members = [*(members or ()), *(named or ())]
    if planning.plan:
        from softmeet.cli.plan import show_plan

        where = {name: loading.arguments()[name] for name in ("dtype", "device", "trust_remote_code")}
        show_plan(members or [options.DEFAULT], planning.batch, planning.context, as_json=as_json, **where)
        return
    ensemble = loading.ensemble(members, settings)
    if ensemble.model.over_bytes:
        from softmeet.cli.check_bytes import check_bytes

        check_bytes(ensemble, None if text is None else text.read_text(encoding="utf-8"), tokens, as_json=as_json)
        return
    with options.status("comparing heads"):
        facts = _facts(ensemble)
    if text is not None:
        from softmeet.evaluation.premise import premise_scores

        with options.status("testing the premise"):
            scores = premise_scores(ensemble, text.read_text(encoding="utf-8"), tokens)
        for member, score in zip(facts["members"], scores, strict=True):
            member["premise"] = asdict(score) | {"verdict": score.verdict}
    if len(ensemble.names) > 1 and (text is not None or sampled):
        with options.status("seeing how far meet moves the pool"):
            facts["movement"] = _movement(ensemble, None if text is None else text.read_text("utf-8"), tokens, sampled)
    facts["advice"] = _advice(facts)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


def _movement(ensemble: Ensemble, text: str | None, tokens: int, sampled: int) -> dict[str, Any]:
    import torch

    from softmeet.hf.calibrated import moved, own_text

    if text is None:
        hidden = own_text(ensemble.model, sampled)
    else:
        stretches = [states for states, _ in ensemble.positions(text, tokens)]
        hidden = [torch.cat(own) for own in zip(*stretches, strict=True)]
    return moved(ensemble.model, hidden).figures()


def _facts(ensemble: Ensemble) -> dict[str, Any]:
    from softmeet.hf.plan import solver_bytes
    from softmeet.members.heads import principal_cosines, same_column_space

    heads, names = ensemble.model.heads, [options.short(name) for name in ensemble.names]
    members = [
        {
            "name": name,
            "rows": head.v,
            "width": head.d,
            "rank": head.whitening().rank,
            "bias": head.bias is not None,
            "scale": head.scale,
            "soft_cap": head.soft_cap,
            "megabytes": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
        }
        for name, head, model in zip(names, heads, ensemble.model.members, strict=True)
    ]
    pairs = []
    for i, j in itertools.combinations(range(len(heads)), 2):
        cosines = principal_cosines(heads[i], heads[j])
        pairs.append(
            {
                "members": [names[i], names[j]],
                "median_cosine": cosines.median().item() if len(cosines) else math.nan,
                "cosines_above_0.9": int((cosines > 0.9).sum()),
                "of": len(cosines),
                "shared": same_column_space(heads[i], heads[j]),
            }
        )
    width, tokens = sum(head.whitening().rank for head in heads), len(ensemble.tokenizer.get_vocab())
    return {
        "vocabulary": "tokens",
        "members": members,
        "pairs": pairs,
        "tokens": tokens,
        "rank": width,
        "share": width / tokens,
        "solver_megabytes_per_row": solver_bytes(tokens, len(heads), width, 1) / 1e6,
    }


def _advice(facts: dict[str, Any]) -> str:
    """One sentence."""
    members, pairs = facts["members"], facts["pairs"]
    if len(members) == 1:
        return "One member: every rule returns its own distribution."
    if pairs and all(pair["shared"] for pair in pairs):
        return "All heads span one column space, so meet can only be averaging: use logit-mean and save its cost."
    verdicts = {m["name"]: m["premise"]["verdict"] for m in members if "premise" in m}
    trusted = [name for name, verdict in verdicts.items() if verdict == "trust"]
    if verdicts and not trusted:
        return "No member's errors look like its softmax's on this text: use logit-mean or the best member alone."
    if verdicts:
        rest = [f"{name} ({verdict})" for name, verdict in verdicts.items() if name not in trusted]
        others = f", hardly {', '.join(rest)}" if rest else ""
        return f"Trust {', '.join(trusted)}{others}; then compare with logit-mean on other text."
    if facts["share"] >= 1:
        return "The heads together are as wide as the vocabulary, so exact agreement has at most one answer: use meet."
    return "Give --text to see which members to trust."


def _show(facts: dict[str, Any]) -> None:
    console = Console()
    tested = "premise" in facts["members"][0]
    table = Table(
        "member", "rows", "width", "rank", "bias", "soft-cap", "MB", title=f"{facts['tokens']:,} common tokens"
    )
    for name in ("premise score", "first-order gain (nats per unit of trust)", "verdict") if tested else ():
        table.add_column(name)
    for m in facts["members"]:
        row = [escape(m["name"]), f"{m['rows']:,}", str(m["width"]), str(m["rank"]), "yes" if m["bias"] else "no"]
        row += [f"{m['soft_cap']:g}" if m["soft_cap"] else "no", f"{m['megabytes']:,.1f}"]
        if tested:
            p = m["premise"]
            row += [f"{p['score']:.2f} ± {p['score_error']:.2f}", f"{p['gain']:+.4f} ± {p['error']:.4f}", p["verdict"]]
        table.add_row(*row)
    console.print(table)
    for pair in facts["pairs"]:
        console.print(
            f"{escape(' and '.join(pair['members']))}: median principal cosine {pair['median_cosine']:.2f}, "
            f"{pair['cosines_above_0.9']} of {pair['of']} above 0.9" + (", one column space" if pair["shared"] else "")
        )
    console.print(
        f"Together {facts['rank']} directions for {facts['tokens']:,} tokens ({facts['share']:.1%}); the solver needs "
        f"about {facts['solver_megabytes_per_row']:,.1f} MB a row beside the models."
    )
    if "movement" in facts:
        console.print(f"On {facts['movement']['positions']} tokens {escape(facts['movement']['says'])}")
    console.print(f"[bold]{escape(facts['advice'])}")
