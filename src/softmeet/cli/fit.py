"""``softmeet fit``: learn weights, temperature and trusts from a text, and save the ensemble that is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from softmeet.cli import options, texts
from softmeet.cli.flags import Flags, at_least_one, flag, flags, optional, switch
from softmeet.cli.messages import say
from softmeet.cli.progress import progress, working
from softmeet.cli.tables import candidate, difference, print_table
from softmeet.cli.tables import out as stdout
from softmeet.cli.terminal import harmless
from softmeet.evaluation.choices import loaded_by
from softmeet.evaluation.record import repeats
from softmeet.extras import require_extra
from softmeet.members.files import TRACED, is_files, refuse_files
from softmeet.members.member import Member
from softmeet.members.registered import refuse_servers
from softmeet.rules.settings import rule_of

if TYPE_CHECKING:
    from softmeet.evaluation.candidates import Options


class FitFlags(Flags, panel="Finding weights"):
    """Flags for the rules and settings that a fit tries, and for how much text it fits, chooses and judges them by."""

    rules: list[str] | None = optional(
        "Also try this rule, as in meet:trust=1/0.3; what it does not set, but for its temperature, is taken from the "
        "fitted average with the lower loss on the first part. It can be repeated.",
        "--rule",
    )
    free_weights: bool = switch("Do not require that weights sum to 1.")
    signed_weights: bool = switch(
        "Also try logit-mean with weights that may be below 0 and sum to 1: they move it away from a member."
    )
    meet_tokens: int = flag(2000, "The tokens on which meet is fitted; averages are fitted on all.", min=1)
    evaluations: int = flag(
        15, "The most times to compute the loss when fitting meet; for averages, five times as many.", min=1
    )
    premise_tokens: int = flag(
        512,
        "How many tokens to use for the test of softmeet check --text; its result gives the trusts from which the fit "
        "starts.",
        min=1,
    )
    batch: int | None = at_least_one(
        "Fit meet on batches of N tokens, for when all of --meet-tokens at once take too long; the fit then starts "
        "from the better average only.",
        shown="all",
    )
    select_tokens: int | None = at_least_one(
        "The most tokens to use for choosing among the candidates.", shown="all of that part"
    )
    folds: int | None = optional(
        "Deal the documents out to N folds, in place of three parts: everything is fitted on all but one, and judged "
        "on that one, in turn; what is saved is fitted on all. It uses short texts better, and takes N times as long.",
        min=2,
        shown="three parts",
    )
    judge_tokens: int | None = at_least_one("The most tokens to use for judging the choice.", shown="all of that part")

    def options(self) -> Options:
        """Return the flags as the :class:`softmeet.evaluation.candidates.Options` of a fit.

        ``meet_tokens`` becomes ``meet_positions``, and so on; ``rules`` becomes a tuple, empty for None.
        """
        from softmeet.evaluation.candidates import Options

        renamed = {name.replace("_tokens", "_positions"): value for name, value in vars(self).items()}
        return Options(**renamed | {"rules": tuple(self.rules or ())})


@flags()
def fit(
    *,
    out: Path = flag(..., "The folder for the fitted ensemble.", panel="Output"),
    members: options.Members = None,
    source: texts.SourceFlags,
    fitting: FitFlags,
    result: texts.ResultFlags,
    loading: options.LoadingFlags,
    running: options.EngineFlags,
) -> None:
    """Learn from a text how much each model should count, and save the best mix.

    The documents are divided into three parts. On the first, the averages and meet are fitted (weights, trusts, and a
    temperature of the result); on the second, the best of them and of each --rule is chosen; on the third, that one is
    measured. Give --text or --trace; few documents are cut into blocks.

    Example: softmeet fit -m wide/gpt2 -m wide/llama --text 'books/*.txt' --out my-ensemble
    """
    from softmeet.evaluation.files import PieceCache, require_ensemble_folder

    require_extra("fit", "eval", "psutil", "scipy")
    require_ensemble_folder(out)
    result.require(out, out / "config.json")
    rule = loaded_by(fitting.rules or [])
    found = source.documents()
    named = options.named(source.members(members))
    refuse_servers(Member.of(line) for line in named if not is_files(line))
    if source.trace:
        refuse_files(named, TRACED)
    loading.refuse_exact(named, [document.text for document in found], source.surely_read)
    reads = rule is not None and rule_of(rule).reads_heads
    ensemble = loading.ensemble(named, {"rule": rule} if reads else {}, prune=source.prune(None))
    from softmeet.evaluation.fit import fit as learn
    from softmeet.evaluation.own_files import hold_out
    from softmeet.evaluation.positions import observe_text
    from softmeet.evaluation.save import figures, save

    given = fitting.options()
    settings = asdict(given) | {"threads": running.threads}
    positions, pinned = source.identified(ensemble, found)
    with working("reading files") as show:
        hold_out(ensemble, found, show)
    kept = PieceCache(result.resume, pinned | settings)
    with result.stoppable(), running.start(ensemble) as engine, progress() as begin:
        if positions is None:
            reading = partial(begin, f"reading the text, in {ensemble.model.config.vocabulary}", 0)
            positions = observe_text(ensemble, found, **source.windowing, engine=engine, cache=kept, begin=reading)
        fitted = learn(ensemble, positions, given, begin, engine=engine, cache=kept)
    facts = figures(fitted)
    try:
        result.report(facts, partial(_show, ensemble.names))
    finally:  # even if that fails, for example because a disk is full
        save(ensemble, fitted, out)
    if facts["caution"]:
        say(facts["caution"])
    if result.as_json != Path("-"):
        typer.echo(harmless(f"saved in {out}; the settings of the other candidates are in its fit.json"))


def _show(members: Sequence[str], facts: dict[str, Any]) -> None:
    """Print a fit's figures on stdout: a table with a line for each candidate, and the verdict."""
    from softmeet.evaluation.save import verdict

    sizes = ", ".join(f"{part['tokens']:,} to {name}" for name, part in facts["splits"].items())
    judged = facts["splits"]["test"]
    title = f"{facts['vocabulary']}: {sizes}; figures on the last, in {judged['clusters']} {judged['kind']}"
    if facts["folds"]:
        spread = f"{judged['clusters']} {judged['kind']}"
        title = f"{judged['tokens']:,} {facts['vocabulary']} in {spread}; each judged by a fit without its fold"
    unit, best = facts["vocabulary"][:-1], facts["test"]["best_baseline"]
    columns = ("candidate", f"nats a {unit}", "against the best baseline", "weights", "trust", "temperature")
    rows = []
    for name, row in facts["candidates"].items():
        against = "the baseline" if name == best else difference(row["delta"], row["ci95"])
        rows.append(candidate(name, row, f"{row['test_nll']:.4f}", against))
    print_table(stdout(), columns, [rows], title=title, texts=(0, 3, 4))
    stdout().print(verdict(facts), style="bold")
    if facts["files"]:
        alone, beside = facts["files"]["alone"], facts["files"]["beside"]
        gain = difference(facts["files"]["gain"], facts["files"]["interval"])
        stdout().print(f"With the files beside it {beside:.4f} bits a byte, without {alone:.4f}: a gain of {gain}.")
    for line in repeats(members):
        stdout().print(line)
