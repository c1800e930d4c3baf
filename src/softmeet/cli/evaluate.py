"""``softmeet evaluate``: measure how well rules predict a text, beside every member and the averages."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from softmeet import __version__
from softmeet.cli import options, texts
from softmeet.cli.flags import at_least_one, checked_settings, flag_of, flags, optional
from softmeet.cli.messages import say
from softmeet.cli.progress import progress
from softmeet.cli.tables import counted, difference, number, out, print_table
from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import parse_choices, under_gates, with_baselines, without_prompt
from softmeet.extras import require_extra
from softmeet.rules.endings import endings
from softmeet.rules.registry import rule_names
from softmeet.rules.settings import parse_rule
from softmeet.rules.values import POOLS

_RULE = (
    "A rule to measure, with options after colons and slashes between numbers, as in meet:trust=1/0.3:pool=prob-mean; "
    f"it can be repeated. The rules: {', '.join(rule_names())}."
)


# From so many tokens or bytes on, intervals are taken to be sound.
_ENOUGH = 500


@flags("rule", "gate")
def evaluate(
    *,
    members: options.Members = None,
    source: texts.SourceFlags,
    rules: list[str] | None = optional(
        _RULE, "--rule", shown="a saved ensemble's, else meet; over bytes the averages", panel="Rule"
    ),
    gates: list[str] | None = optional(
        "Measure every rule twice: without a gate, and with this one, such as unsure:0.5 (softmeet generate --help "
        "has all forms); it can be repeated.",
        "--gate",
        shown="none, or a saved ensemble's own unless that is auto",
        panel="Rule",
    ),
    prompt_weights: int | None = at_least_one(
        "Also measure logit-mean with weights that are chosen for each document by how well each member predicts its "
        "first N tokens.",
        shown="off",
        panel="Rule",
    ),
    folds: int | None = optional(
        "Also measure every member and average at its best: weights, temperature and order are fitted on all but one "
        "of N folds of the documents, and judged on that one, in turn; averages also with weights that adapt to each "
        "document as it goes.",
        min=2,
        shown="nothing is fitted",
        panel="Rule",
    ),
    plots: Path | None = optional("Draw plots, as PNG files, into this folder.", panel="Output"),
    result: texts.ResultFlags,
    loading: options.LoadingFlags,
    running: options.EngineFlags,
    **settings: Any,
) -> None:
    """Measure how well rules predict a text, beside each member and the averages, with 95 % intervals.

    The figures are mean losses in nats per token (over bytes: per byte), perplexity, bits per byte, accuracy and
    calibration, and each row's difference from the best member or average. Intervals are paired, and clustered by
    document; few documents are cut into blocks. Give --text or --trace. --trust, --weights and --pool apply to each
    --rule that does not set them itself.

    Example: softmeet evaluate -m wide/gpt2 -m wide/llama --text 'books/*.txt' --rule meet:trust=1 --rule logit-mean
    """
    require_extra(
        "evaluate", "eval", "psutil", "scipy", *["pyarrow"] * bool(source.trace), *["matplotlib"] * bool(plots)
    )
    result.require(plots, *(plots.glob("*.png") if plots else ()))
    found = source.documents()
    settings["rule"] = _require_once(rules or [], settings)
    ensemble = loading.ensemble(options.named(source.members(members)), settings)
    own = ensemble.model.config
    named = rules or [own.rule]
    if prompt_weights:
        named = [*named, f"{POOLS[0]}:prompt_weights={prompt_weights}"]
    gates = gates or ([own.gate] if own.gate and own.gate != "auto" else [])
    parsed = under_gates(parse_choices(named, len(ensemble.names), own.bands), gates)
    choices = with_baselines(parsed, own.weights or (), own.rule_temperature)
    from softmeet.evaluation.by_folds import evaluate_by_folds
    from softmeet.evaluation.files import PieceCache
    from softmeet.evaluation.perplexity import evaluate_positions, evaluate_text
    from softmeet.evaluation.positions import observe_text
    from softmeet.evaluation.report import summary

    how = {
        "threads": running.threads,
        "choices": [asdict(choice) for choice in choices],
        "ensemble": own.settings.ungated().plain(),
        "folds": folds,
    }
    positions, pinned = source.identified(ensemble, found)
    kept = PieceCache(result.resume, pinned | how)
    with result.stoppable(), running.start(ensemble) as engine, progress() as begin:
        where: dict[str, Any] = {"engine": engine, "cache": kept}
        if positions is None and folds is not None:
            reading = partial(begin, "running the members", 0)
            positions = observe_text(ensemble, found, **where, **source.windowing, begin=reading)
        if positions is None:
            scoring = partial(begin, "evaluating", 0)
            made = evaluate_text(ensemble, found, choices, **where, **source.windowing, begin=scoring)
        elif folds is not None:
            made = evaluate_by_folds(ensemble, positions, choices, folds, begin, **where)
        else:
            advance = begin("evaluating", 0, len(positions))
            made = evaluate_positions(ensemble, positions, choices, **where, on_progress=advance)
        facts = summary(made) | {"run": {"softmeet": __version__, "rules": how, **pinned}}
    result.report(facts, show)
    if plots is not None:
        from softmeet.evaluation.plots import draw

        draw(facts, plots)
        say(f"plots are in {plots}")


def _require_once(rules: list[str], settings: dict[str, Any]) -> str | None:
    """Check, before anything is loaded, that each rule can be parsed, goes with the settings, and names none of them.

    Args:
        rules: the values of ``--rule``.
        settings: values of settings' flags by name; None if the flag was not given.

    Returns:
        The first rule with its own options, as the ensemble's own; None without a rule.

    Raises:
        InvalidInputError: if a rule cannot be parsed, or a setting is named twice or not one for this rule.
    """
    own = []
    for rule in rules:
        parsed, named = parse_rule(without_prompt(rule)[0])
        for name in named:
            if settings.get(name) is not None:
                by = f"in the rule {rule!r} and by {flag_of(name)}"
                raise InvalidInputError(f"{name} is named twice, {by}: leave one out")
        own.append(str(parsed))
        checked_settings({**settings, **named, "rule": own[-1]})
    return own[0] if own else None


def show(facts: dict[str, Any]) -> None:
    """Print an evaluation's figures on stdout: a table with a line for each member and rule, and notes on rules.

    Args:
        facts: the figures, as :func:`softmeet.evaluation.report.summary` returns them.
    """
    console, unit = out(), facts["vocabulary"]
    spread = f"{facts['clusters']['count']} {facts['clusters']['kind']}"
    gated = ["gated"] if any(row["gated"] for row in facts["rules"].values()) else []
    columns = (
        "member or rule", f"nats a {unit[:-1]}", "perplexity", "bits a byte", "top-1 right", "calib. error",
        *gated, "against the best baseline",
    )  # fmt: skip
    sections = [
        [
            (
                options.short(name) if kind == "members" else name, number(row["nll"], ".4f"),
                number(row["perplexity"], ".2f" if row["perplexity"] < 1e6 else ".3g"),
                "" if row["bits_per_byte"] is None else number(row["bits_per_byte"], ".4f"),
                f"{row['top1']:.3f}", f"{row['calibration']['error']:.3f}",
                *(f"{row[key]:.1%}" if row.get(key) else "" for key in gated),
                _against(name, row, facts["best_baseline"]),
            )
            for name, row in facts[kind].items()
        ]
        for kind in ("members", "rules")
    ]  # fmt: skip
    title = f"{facts['tokens']:,} {unit} of {counted(facts['documents'], 'document')}; intervals by {spread}"
    print_table(console, columns, sections, title=title, optional=6 if gated else None)
    for name, row in facts["rules"].items():
        for note in _notes(row, unit[:-1]):
            console.print(f"{name}: {note}")
    for caution in _cautions(facts):
        console.print(caution)
    console.print(
        f"The best baseline is the best of the members and the averages, on this same text. Differences are in nats a "
        f"{unit[:-1]}, negative is better, with their 95 % intervals. The members disagree by "
        f"{facts['disagreement']:.3f} nats a {unit[:-1]} (Jensen-Shannon). Rules that are solved by steps are exact "
        f"to --tol, 0.001 nats of KL divergence unless another is given."
    )


def _against(name: str, row: dict[str, Any], best: str) -> str:
    """Return a row's difference from the best baseline, with half its 95 % interval, as a table's cell."""
    if name == best:
        return "the baseline"
    if "vs" not in row:
        return ""
    return difference(row["vs"]["delta"], row["vs"]["ci95"])


def _cautions(facts: dict[str, Any]) -> list[str]:
    """Return sentences on what the figures cannot show; none if there is enough text and more than one member."""
    found = []
    if len(facts["members"]) == 1:
        found.append("There is one member: every rule gives its own predictions.")
    if facts["tokens"] < _ENOUGH:
        found.append(f"{facts['tokens']:,} {facts['vocabulary']} are few: intervals may be too narrow.")
    return found


def _notes(row: dict[str, Any], unit: str) -> list[str]:
    """Return sentences on how a rule ended where it did not solve, and on how far it moved the pool; perhaps none."""
    return endings(row["statuses"], row["fallbacks"], unit) + ([row["movement"]["says"]] if "movement" in row else [])
