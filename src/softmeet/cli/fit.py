"""``softmeet fit``: learn weights, temperature and trusts from a text, and save the ensemble that is best."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softmeet.cli import options, texts
from softmeet.cli.flags import flag, flags
from softmeet.rules.settings import parse_rule, rule_of

if TYPE_CHECKING:
    from softmeet.evaluation.fit import Options


@dataclass
class FitFlags:
    """Flags for the rules and settings that a fit tries, and for how much text it fits, chooses and judges them by."""

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
        """Return the flags as the :class:`softmeet.evaluation.fit.Options` of a fit.

        ``meet_tokens`` becomes ``meet_positions``, and so on; ``rules`` becomes a tuple, empty for None.
        """
        from softmeet.evaluation.fit import Options

        renamed = {name.replace("_tokens", "_positions"): value for name, value in vars(self).items()}
        return Options(**renamed | {"rules": tuple(self.rules or ())})


@flags()
def fit(
    *,
    out: Annotated[
        Path, typer.Option("--out", help="The folder of the fitted ensemble: a new one, or an older ensemble's.")
    ],
    members: options.Members = None,
    source: texts.SourceFlags,
    fitting: FitFlags,
    result: texts.ResultFlags,
    loading: options.LoadingFlags,
    running: options.EngineFlags,
) -> None:
    """Learn weights, temperature and trusts, and save the best ensemble; or the best average, unless meet is better."""
    from softmeet.evaluation.files import require_ensemble_folder

    texts.require_extra(psutil=True, scipy=True, pyarrow=source.trace)
    texts.require_places(result.as_json, out, result.resume)
    require_ensemble_folder(out)
    for rule in fitting.rules or ():
        parse_rule(rule)
    found = source.documents()
    ensemble = loading.ensemble(source.members(members))
    from softmeet.evaluation.files import PieceCache
    from softmeet.evaluation.fit import fit as learn
    from softmeet.evaluation.positions import observe_text
    from softmeet.evaluation.save import figures, save

    given = fitting.options()
    # ``bands`` is no part of the key: pieces kept by a fit with other bands are used again.
    settings = {name: value for name, value in asdict(given).items() if name != "bands"} | {"threads": running.threads}
    positions, pinned = source.identified(ensemble, found)
    kept = PieceCache(result.resume, pinned | settings)
    if fitting.bands > 1:
        ensemble.model.require_tokens("--bands")
    ensemble.model.combiner.banded_heads(fitting.bands)  # made here, so that workers share them
    with result.stoppable(), running.start(ensemble) as engine, texts.progress() as begin:
        if positions is None:
            positions = observe_text(
                ensemble, found, max_tokens=source.max_tokens, **source.windows, engine=engine, cache=kept,
                on_progress=begin("running the members", 0, None),
            )  # fmt: skip
        fitted = learn(ensemble, positions, given, begin, engine=engine, cache=kept)
    facts = figures(fitted)
    result.tell(facts, _show)
    try:
        save(ensemble, fitted, out)
    finally:  # even if saving fails, for example because that disk is full
        result.write(facts)
    if result.as_json != Path("-"):
        Console().print(f"saved in {out}", markup=False)


def _show(facts: dict[str, Any]) -> None:
    """Print a fit's figures on stdout: a table with a line for each candidate, and the verdict."""
    from softmeet.evaluation.save import verdict

    sizes = ", ".join(f"{part['tokens']:,} to {name}" for name, part in facts["splits"].items())
    title = f"{facts['vocabulary']}: {sizes}; figures on the last"
    table = Table("candidate", "nats", "vs best baseline", "weights", "trust", "T", title=title)
    for name, row in facts["candidates"].items():
        low, high = row["ci95"]
        weights, trust = (" ".join(f"{x:.2f}" for x in row[key]) for key in ("weights", "trust"))
        table.add_row(
            escape(options.short(name) if "/" in name else name), f"{row['test_nll']:.4f}",
            "is it" if name == facts["test"]["best_baseline"] else f"{row['delta']:+.4f} ± {(high - low) / 2:.4f}",
            weights, trust if rule_of(row["rule"]).uses_trust else "", f"{row['rule_temperature']:.2f}",
        )  # fmt: skip
    Console().print(table)
    Console().print(f"[bold]{escape(verdict(facts))}[/]")
