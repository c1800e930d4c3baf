"""``softmeet evaluate``: measure how well rules predict a text, beside every member and the averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmeet import __version__
from softmeet.cli import options, texts
from softmeet.cli.flags import Flags, at_least_one, checked_settings, flag_of, flags, optional, switch
from softmeet.cli.messages import say
from softmeet.cli.paper import FORMS, paper_table
from softmeet.cli.progress import progress
from softmeet.cli.tables import counted, difference, number, out, print_table
from softmeet.cli.terminal import write
from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import (
    FITTED,
    RuleChoice,
    loaded_by,
    parse_choices,
    under_gates,
    with_baselines,
    without_prompt,
)
from softmeet.evaluation.labels import labels_of, row_of
from softmeet.evaluation.record import Record, read_as, repeats
from softmeet.extras import require_extra
from softmeet.members.files import TRACED, refuse_files
from softmeet.rules.endings import endings
from softmeet.rules.frozen import unknown
from softmeet.rules.registry import rule_names
from softmeet.rules.settings import parse_rule
from softmeet.rules.values import POOLS

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.evaluation.documents import Document
    from softmeet.evaluation.positions import Positions
    from softmeet.evaluation.scores import Evaluation
    from softmeet.hf.configuration import EnsembleConfig

_RULE = (
    "A rule to measure, with options after colons and slashes between numbers, as in meet:trust=1/0.3:pool=prob-mean; "
    f"it can be repeated. The rules: {', '.join(rule_names())}."
)


# Why files are no part of what is fitted by folds.
_FOLDED = "averages are fitted to models alone, which softmeet fit --folds N does beside files; leave --folds out"
# From so many tokens or bytes on, intervals are taken to be sound.
_ENOUGH = 500


class MeasuredFlags(Flags, panel="Mixing"):
    """Flags for which ways to mix models are measured."""

    rules: list[str] | None = optional(_RULE, "--rule", shown="a saved ensemble's, else meet; over bytes the averages")
    gates: list[str] | None = optional(
        "Measure every rule twice: without a gate, and with this one, such as unsure:0.5 (softmeet generate --help "
        "has all forms); it can be repeated.",
        "--gate",
        shown="none, or a saved ensemble's own unless that is auto",
    )
    prompt_weights: int | None = at_least_one(
        "Also measure logit-mean with weights that are chosen for each document by how well each member predicts its "
        "first N tokens.",
        shown="off",
    )
    folds: int | None = optional(
        "Also measure every member and average at its best: weights, temperature and order are fitted on all but one "
        "of N folds of the documents, and judged on that one, in turn.",
        min=2,
        shown="nothing is fitted",
    )
    adaptive: bool = switch(
        "With --folds, also measure averages with weights that adapt to a document as it goes; nothing writes text so.",
    )


class FiguresFlags(texts.ResultFlags):
    """Flags for what is compared, and for tables, losses and plots beside the figures."""

    baseline: str | None = optional(
        "The member or rule that all rows are compared with, by its name in the table.",
        shown="the best single member, with its own temperature where temperatures are fitted",
    )
    pairs: str | None = optional(
        "Compare all pairs of these rows, by their names in the table with commas between, or of all, with p-values "
        "that hold for all of them together (Holm).",
        metavar="ROW,ROW|all",
    )
    losses: Path | None = optional(
        "Write the losses in nats to this Parquet file: a row for each document, a column for each member and rule.",
    )
    by_token: bool = switch("With --losses, a row for each token, or byte over bytes.", "--tokens")
    table: str | None = optional("Print a table for a paper and nothing else: latex, csv or markdown.")
    plots: Path | None = optional("Draw plots, as PNG files, into this folder.")

    def require_evaluation(self, mixed: MeasuredFlags) -> None:
        """Check, before anything is loaded, that flags go together and results can be written."""
        if self.table not in (None, *FORMS):
            raise unknown(f"unknown form of a table {self.table!r}", str(self.table), list(FORMS))
        if self.by_token and self.losses is None:
            raise InvalidInputError("--tokens is for --losses FILE, which it writes by token: name a file")
        if mixed.adaptive and mixed.folds is None:
            raise InvalidInputError("--adaptive is about averages that are fitted by folds: give --folds N")
        self.require(self.plots, *(self.plots.glob("*.png") if self.plots else ()), self.losses)


@flags("rule", "gate")
def evaluate(
    *,
    members: options.Members = None,
    source: texts.SourceFlags,
    mixed: MeasuredFlags,
    result: FiguresFlags,
    loading: options.LoadingFlags,
    running: options.EngineFlags,
    **settings: Any,
) -> None:
    """Measure how well models, and ways to mix them, predict a text, with margins of error.

    The figures are mean losses in nats per token (over bytes: per byte), perplexity, bits per byte, accuracy and
    calibration, and each row's difference from the best single member, or from --baseline. Intervals are paired, and
    clustered by document; few documents are cut into blocks. Give --text or --trace. --trust, --weights and --pool
    apply to each --rule that does not set them itself.

    Example: softmeet evaluate -m wide/gpt2 -m wide/llama --text 'books/*.txt' --rule meet:trust=1 --rule logit-mean
    """
    rules, folds = mixed.rules, mixed.folds
    packages = {"pyarrow": result.losses, "matplotlib": result.plots}
    require_extra("evaluate", "eval", "psutil", "scipy", *(name for name, asked in packages.items() if asked))
    result.require_evaluation(mixed)
    record = Record()
    found = source.documents()
    _require_once(rules or [], settings)
    settings["rule"] = loaded_by(rules or [])
    who = options.named(source.members(members))
    _refuse_files(who, folds, source.trace)
    loading.refuse_exact(who, [document.text for document in found], source.surely_read)
    ensemble = loading.ensemble(who, settings, prune=source.prune(options.MEASURED))
    own = ensemble.model.config
    _refuse_files(own.files, folds, source.trace)
    choices = _choices(own, rules, mixed.gates, mixed.prompt_weights)
    from softmeet.evaluation.perplexity import distinct_names
    from softmeet.evaluation.report import summary

    names = distinct_names(ensemble)
    labels = labels_of(names, [*(choice.name for choice in choices), *_fitted(names, folds)])
    baseline = None if result.baseline is None else _row(result.baseline, labels)
    compared = _compared(result.pairs, labels)
    from softmeet.evaluation.files import PieceCache

    how = {
        "threads": running.threads,
        "choices": [asdict(choice) for choice in choices],
        "ensemble": own.settings.ungated().plain(),
        "folds": folds,
        **({"adaptive": True} if mixed.adaptive else {}),
    }
    positions, pinned = source.identified(ensemble, found)
    kept = PieceCache(result.resume, pinned | how)
    with result.stoppable(), running.start(ensemble) as engine, progress() as begin:
        where = {"engine": engine, "cache": kept}
        made = _measured(
            ensemble, found if positions is None else positions, choices, mixed, source.windowing, begin, where
        )
        run = {"softmeet": __version__, "rules": how, **pinned, **record.facts([], running.threads)}
        run = _whole(run, ensemble, choices)
        facts = summary(made, baseline=baseline, pairs=compared) | {"run": run}
    result.report(facts, show if result.table is None else partial(_print_paper, result.table))
    if result.losses is not None:
        from softmeet.evaluation.losses import write_losses

        write_losses(result.losses, made, each=result.by_token)
        say(f"losses are in {result.losses}")
    if result.plots is not None:
        from softmeet.evaluation.plots import draw

        draw(facts, result.plots)
        say(f"plots are in {result.plots}")


def _measured(
    ensemble: Ensemble,
    read: Positions | list[Document],
    choices: list[RuleChoice],
    mixed: MeasuredFlags,
    windowing: dict[str, Any],
    begin: Callable[[str, int, int | None], Callable[[int], None]],
    where: dict[str, Any],
) -> Evaluation:
    """Measure choices on the positions of a trace, or on documents."""
    from softmeet.evaluation.by_folds import evaluate_by_folds
    from softmeet.evaluation.perplexity import evaluate_positions, evaluate_text
    from softmeet.evaluation.positions import observe_text

    vocabulary, folds = ensemble.model.config.vocabulary, mixed.folds
    scoring = f"evaluating, in {vocabulary}"
    if isinstance(read, list) and folds is None:
        return evaluate_text(ensemble, read, choices, **where, **windowing, begin=partial(begin, scoring, 0))
    if isinstance(read, list):
        reading = partial(begin, f"reading the text, in {vocabulary}", 0)
        read = observe_text(ensemble, read, **where, **windowing, begin=reading)
    if folds is not None:
        return evaluate_by_folds(ensemble, read, choices, folds, begin, adaptive=mixed.adaptive, **where)
    return evaluate_positions(ensemble, read, choices, **where, on_progress=begin(scoring, 0, len(read)))


def _choices(
    own: EnsembleConfig, rules: list[str] | None, gates: list[str] | None, prompt_weights: int | None
) -> list[RuleChoice]:
    """Return what is measured of an ensemble, by its own rule and gate where none is named, and averages beside it."""
    named = rules or [own.rule]
    if prompt_weights:
        named = [*named, f"{POOLS[0]}:prompt_weights={prompt_weights}"]
    gates = gates or ([own.gate] if own.gate and own.gate != "auto" else [])
    parsed = under_gates(parse_choices(named, len(own.members)), gates)
    return with_baselines(parsed, own.weights or (), own.rule_temperature)


def _refuse_files(lines: list[str], folds: int | None, trace: Path | None) -> None:
    """Raise InvalidInputError if files are named where models alone are measured."""
    if folds or trace:
        refuse_files(lines, _FOLDED if folds else TRACED)


def _compared(pairs: str | None, labels: dict[str, str]) -> list[str]:
    """Return the rows that ``--pairs`` names, ``all`` for all of them; raise InvalidInputError where one is none."""
    if pairs in (None, "all"):
        return [*labels] if pairs else []
    rows = [_row(row.strip(), labels) for row in str(pairs).split(",")]
    if len({*rows}) < 2:
        raise InvalidInputError(f"expected two rows or more with commas between for --pairs, or all, got {pairs!r}")
    return rows


def _row(name: str, labels: dict[str, str]) -> str:
    """Return the row that a name in the table means; raise InvalidInputError if there is none."""
    from softmeet.evaluation.report import require_row

    row = row_of(name, labels)
    require_row(row, labels)
    return row


def _whole(run: dict[str, Any], ensemble: Ensemble, choices: Sequence[RuleChoice]) -> dict[str, Any]:
    """Return a run's record with how members were read, and all settings of rules, with their defaults."""
    from softmeet.evaluation.perplexity import settings_of

    read, found = read_as(ensemble.names, ensemble.model.members), settings_of(ensemble, choices)
    rules = [
        own | {"settings": found[own["name"]].plain(), "options": found[own["name"]].rule.model_dump(mode="json")}
        for own in run["rules"]["choices"]
    ]
    members = [{**_without(own, "dtype"), **how} for own, how in zip(run["members"], read, strict=True)]
    return _without(run, "dtypes") | {"rules": {**run["rules"], "choices": rules}, "members": members}


def _without(facts: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: fact for name, fact in facts.items() if name != key}


def _fitted(members: list[str], folds: int | None) -> list[str]:
    """Return the names of the rows that folds add."""
    return [] if folds is None else [FITTED + name for name in (*members, *POOLS, "power-mean")]


def _require_once(rules: list[str], settings: dict[str, Any]) -> None:
    """Check, before anything is loaded, that each rule can be parsed, goes with the settings, and names none of them.

    Args:
        rules: the values of ``--rule``.
        settings: values of settings' flags by name; None if the flag was not given.

    Raises:
        InvalidInputError: if a rule cannot be parsed, or a setting is named twice or not one for this rule.
    """
    for rule in rules:
        parsed, named = parse_rule(without_prompt(rule)[0])
        for name in named:
            if settings.get(name) is not None:
                by = f"in the rule {rule!r} and by {flag_of(name)}"
                raise InvalidInputError(f"{name} is named twice, {by}: leave one out")
        checked_settings({**settings, **named, "rule": str(parsed)})


def _print_paper(form: str, facts: dict[str, Any]) -> None:
    """Print figures as a table for a paper."""
    if form == "csv" and "pairs" in facts:
        say("a CSV table has no pairs: --json FILE, --table latex and --table markdown do")
    write(out(), paper_table(facts, form))


def show(facts: dict[str, Any]) -> None:
    """Print an evaluation's figures on stdout: a table with a line for each member and rule, and notes on rules.

    Args:
        facts: the figures, as :func:`softmeet.evaluation.report.summary` returns them.
    """
    console, unit = out(), facts["vocabulary"]
    spread = f"{facts['clusters']['count']} {facts['clusters']['kind']}"
    gated = ["gated"] if any(row["gated"] for row in facts["rules"].values()) else []
    labels = labels_of(facts["members"], facts["rules"])
    columns = (
        "member or rule", f"nats a {unit[:-1]}", "perplexity", "bits a byte", "top-1 right", "calib. error",
        *gated, "against the baseline",
    )  # fmt: skip
    sections = [
        [
            (
                labels[name], number(row["nll"], ".4f"),
                number(row["perplexity"], ".2f" if row["perplexity"] < 1e6 else ".3g"),
                "" if row["bits_per_byte"] is None else number(row["bits_per_byte"], ".4f"),
                f"{row['top1']:.3f}", f"{row['calibration']['error']:.3f}",
                *(f"{row[key]:.1%}" if row.get(key) else "" for key in gated),
                _against(name, row, facts["baseline"]),
            )
            for name, row in facts[kind].items()
        ]
        for kind in ("members", "rules")
    ]  # fmt: skip
    title = f"{facts['tokens']:,} {unit} of {counted(facts['documents'], 'document')}; intervals by {spread}"
    print_table(console, columns, sections, title=title, optional=6 if gated else None)
    if fitted := {name: row["fitted"] for name, row in facts["rules"].items() if "fitted" in row}:
        values = [(labels[name], *_settings(own)) for name, own in fitted.items()]
        print_table(console, ("", "weights", "temperature", "order"), [values], title="fitted on all folds")
    if "pairs" in facts:
        print_table(console, ("", "against", "nats", "p", "p (Holm)"), [[
            (labels[one["first"]], labels[one["second"]], difference(one["delta"], one["ci95"]),
             number(one["p"], ".2g"), number(one["p_holm"], ".2g"))
            for one in facts["pairs"]
        ]], title="all pairs", texts=(0, 1))  # fmt: skip
    for name, row in facts["rules"].items():
        for note in _notes(row, unit[:-1]):
            console.print(f"{labels[name]}: {note}")
    for caution in [*_cautions(facts), *repeats(one["name"] for one in facts.get("run", {}).get("members", ()))]:
        console.print(caution)
    if run := facts.get("run"):
        shares = ", ".join(f"{weight:.2f}" for weight in run["rules"]["ensemble"]["weights"])
        console.print(f"The members' weights, where a rule names none, are {shares}.")
    for files, share in facts.get("claims", {}).items():
        console.print(f"{files} claimed {share:.1%} of every rule's answers, in the mean.")
    console.print(
        f"The baseline is {labels.get(facts['baseline'])}. Differences are in nats a {unit[:-1]}, negative is better, "
        f"with their 95 % intervals. The members disagree by "
        f"{facts['disagreement']:.3f} nats a {unit[:-1]} (Jensen-Shannon). Rules that are solved by steps are exact "
        f"to --tol, 0.001 nats of KL divergence unless another is given."
    )


def _against(name: str, row: dict[str, Any], baseline: str) -> str:
    """Return a row's difference from the baseline, with half its 95 % interval, as a table's cell."""
    return "the baseline" if name == baseline else difference(row["against"]["delta"], row["against"]["ci95"])


def _settings(own: dict[str, Any]) -> tuple[str, str, str]:
    """Return the weights, the temperature and the order of a power mean that were fitted, as cells."""
    order = f"{own['order']:.2f}" if "order" in own else ""
    return " ".join(f"{x:.2f}" for x in own["weights"]), f"{own['rule_temperature']:.2f}", order


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
