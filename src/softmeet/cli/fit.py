"""``softmeet fit``: weights, temperature and trusts from a text, and an ensemble that is never worse than averaging."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softmeet.cli import engines, options, texts
from softmeet.cli.config import Config
from softmeet.cli.evaluate import Json, Traced, after, identified, tell, write
from softmeet.cli.flags import flag, flags

if TYPE_CHECKING:
    from softmeet.evaluation.fit import Options


_SIZES = ("meet", "premise", "select", "judge")


@dataclass
class Fitting:
    """What is tried, and on how much of the text."""

    rules: list[str] | None = flag(
        None,
        "One more candidate, with options: meet:trust=1/0.3; what it does not name is the fitted average's; repeat it.",
        "--rule",
    )
    free_weights: bool = flag(False, "Weights need not sum to one.", "--free-weights")
    bands: int = flag(1, "Also try a trust for each of so many bands of a head's principal directions.", min=1)
    meet_tokens: int = flag(2000, "Size of the subset on which meet is fitted; averages take all.", min=1)
    evaluations: int = flag(15, "Of loss and gradient, at most, for each meet; averages get five times as many.", min=1)
    premise_tokens: int = flag(512, "Size of the subset of the premise test, which says where trusts start.", min=1)
    batch: int | None = flag(
        None,
        "Positions of each evaluation for meet, where heads are so wide that its whole subset takes too long; meet "
        "then starts from the better average only.",
        min=1,
        shown="the whole subset",
    )
    select_tokens: int | None = flag(None, "Of the part to choose by, at most.", min=1, shown="all")
    judge_tokens: int | None = flag(None, "Of the part to judge by, at most.", min=1, shown="all")

    def options(self) -> Options:
        """Give them as :func:`softmeet.evaluation.fit.fit` takes them."""
        from softmeet.evaluation.fit import Options

        same = {name: getattr(self, name) for name in ("free_weights", "bands", "evaluations", "batch")}
        sizes = {f"{name}_positions": getattr(self, f"{name}_tokens") for name in _SIZES}
        return Options(**same, **sizes, rules=tuple(self.rules or ()))


@flags()
def fit(
    *,
    out: Annotated[
        Path, typer.Option("--out", help="The folder of the fitted ensemble: a new one, or an older ensemble's.")
    ],
    members: options.Members = None,
    reading: texts.Reading,
    trace: Traced = None,
    fitting: Fitting,
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
    for rule in fitting.rules or ():
        parse_rule(rule)
    found = reading.documents_unless(trace)
    ensemble = loading.ensemble(texts.default_members(members, trace))
    from softmeet.evaluation.fit import figures
    from softmeet.evaluation.fit import fit as learn
    from softmeet.evaluation.kept import Kept
    from softmeet.evaluation.positions import observe_text
    from softmeet.evaluation.save import save

    given = fitting.options()
    # What is kept for other bands is of use for these.
    settings = {name: value for name, value in asdict(given).items() if name != "bands"} | {"threads": running.threads}
    positions, pinned = identified(ensemble, found, trace, reading)
    kept = Kept(resume, pinned | settings)
    if fitting.bands > 1:
        ensemble.model.require_tokens("--bands")
    ensemble.model.combiner.banded_heads(fitting.bands)  # made here, so that workers share them
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
    title = f"{facts['vocabulary']}: {sizes}; figures on the last"
    table = Table("candidate", "nats", "vs best baseline", "weights", "trust", "T", title=title)
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
