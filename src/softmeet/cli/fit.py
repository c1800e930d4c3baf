"""``softmeet fit``: weights, temperature and trusts from a text, and an ensemble that is never worse than averaging."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softmeet.cli import engines, options, texts
from softmeet.cli.config import Config
from softmeet.cli.evaluate import Json, Traced, after, identified, tell, write
from softmeet.cli.flags import flags


@flags()
def fit(
    *,
    out: Annotated[
        Path, typer.Option("--out", help="The folder of the fitted ensemble: a new one, or an older ensemble's.")
    ],
    members: options.Members = None,
    reading: texts.Reading,
    trace: Traced = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            help="One more candidate, with options: meet:trust=1/0.3; what it does not name is the fitted average's; "
            "repeat it.",
        ),
    ] = None,
    free_weights: Annotated[bool, typer.Option("--free-weights", help="Weights need not sum to one.")] = False,
    bands: Annotated[
        int, typer.Option(min=1, help="Also try a trust for each of so many bands of a head's principal directions.")
    ] = 1,
    meet_tokens: Annotated[
        int, typer.Option(min=1, help="Size of the subset on which meet is fitted; averages take all.")
    ] = 2000,
    evaluations: Annotated[
        int, typer.Option(min=1, help="Of loss and gradient, at most, for each meet; averages get five times as many.")
    ] = 15,
    premise_tokens: Annotated[
        int, typer.Option(min=1, help="Size of the subset of the premise test, which says where trusts start.")
    ] = 512,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Positions of each evaluation for meet, where heads are so wide that its whole subset takes too long; "
            "meet then starts from the better average only.",
            show_default="the whole subset",
        ),
    ] = None,
    select_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the part to choose by, at most.", show_default="all")
    ] = None,
    judge_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the part to judge by, at most.", show_default="all")
    ] = None,
    as_json: Json = None,
    resume: engines.Resume = None,
    loading: options.Loading,
    running: engines.Running,
    config: Config = None,
) -> None:
    """Learn weights, temperature and trusts, and save the best ensemble; or the best average, unless meet is better."""
    from softmeet.evaluation.files import require_ensemble_folder
    from softmeet.rules.settings import parse_rule

    texts.require_extra(psutil=True, scipy=True, pyarrow=trace)
    texts.require_places(as_json, out, resume)
    require_ensemble_folder(out)
    for rule in rules or ():
        parse_rule(rule)
    found = reading.documents_unless(trace)
    ensemble = loading.ensemble(texts.default_members(members, trace))
    from softmeet.evaluation.fit import Options, figures
    from softmeet.evaluation.fit import fit as learn
    from softmeet.evaluation.kept import Kept
    from softmeet.evaluation.positions import observe_text
    from softmeet.evaluation.save import save

    given = Options(
        free_weights, bands, meet_positions=meet_tokens, premise_positions=premise_tokens, evaluations=evaluations,
        batch=batch, select_positions=select_tokens, judge_positions=judge_tokens,
        rules=tuple(rules or ()),
    )  # fmt: skip
    # What is kept for other bands is of use for these.
    settings = {name: value for name, value in asdict(given).items() if name != "bands"} | {"threads": running.threads}
    positions, pinned = identified(ensemble, found, trace, reading)
    kept = Kept(resume, pinned | settings)
    ensemble.model.banded_heads(bands)  # made here, so that workers share them
    with (
        options.stoppable(after(resume)),
        running.start(ensemble) as engine,
        texts.progress() as begin,
    ):
        if positions is None:
            advance = begin("running the members", 0, None)
            positions = observe_text(
                ensemble,
                found or [],
                max_tokens=reading.max_tokens,
                engine=engine,
                kept=kept,
                on_progress=advance,
                **reading.windows,
            )
        fitted = learn(ensemble, positions, given, begin, engine=engine, kept=kept)
    facts = figures(fitted)
    tell(facts, as_json, _show)
    try:
        save(ensemble, fitted, out)
    finally:  # the figures may have room elsewhere
        write(facts, as_json)
    if as_json != Path("-"):
        Console().print(f"saved in {out}", markup=False)


def _show(facts: dict[str, Any]) -> None:
    from softmeet.evaluation.save import verdict
    from softmeet.rules.settings import rule_of

    parts = facts["splits"]
    sizes = ", ".join(f"{parts[name]['tokens']:,} to {name}" for name in parts)
    table = Table(
        "candidate", "nats", "vs best baseline", "weights", "trust", "T", title=f"{sizes}; figures on the last"
    )
    for name, row in facts["candidates"].items():
        low, high = row["ci95"]
        best = name == facts["test"]["best_baseline"]
        against = "is it" if best else f"{row['delta']:+.4f} ± {(high - low) / 2:.4f}"
        weights, trust = (" ".join(f"{x:.2f}" for x in row[key]) for key in ("weights", "trust"))
        shown = options.short(name) if "/" in name else name
        table.add_row(
            escape(shown), f"{row['test_nll']:.4f}", against, weights, trust if rule_of(row["rule"]).uses_trust else "",
            f"{row['rule_temperature']:.2f}",
        )  # fmt: skip
    Console().print(table)
    Console().print(f"[bold]{escape(verdict(facts))}[/]")
