"""``softmeet evaluate``: how well rules predict a text, beside every member and the averages."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softmeet.cli import engines, options, texts
from softmeet.cli.config import Config
from softmeet.cli.flags import flag, flag_of, flags
from softmeet.cli.old_forms import repeated
from softmeet.errors import InvalidInputError

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.evaluation.positions import Positions

Json = Annotated[
    Path | None, typer.Option("--json", help="Write the figures here as JSON, infinity as null; - for stdout.")
]
_OWN = "the ensemble's own"
Traced = Annotated[Path | None, typer.Option("--trace", help="A trace, in place of --text.")]


@dataclass
class Tried:
    """What is set side by side."""

    rules: list[str] | None = flag(
        None, "A rule with options: meet:trust=1/0/0.3:pool=prob-mean; repeat it.", "--rule", shown=_OWN
    )
    gates: list[str] | None = flag(
        None, "Try each rule under this gate too: unsure:0.5; repeat it.", "--gate", shown=_OWN
    )
    prompt_weights: int | None = flag(
        None, "Add logit-mean with weights from the members' perplexity on so many tokens of each document.", min=1
    )


@flags("rule", "gate")
def evaluate(
    *,
    members: options.Members = None,
    reading: texts.Reading,
    trace: Traced = None,
    tried: Tried,
    plots: Annotated[Path | None, typer.Option(help="A folder for PNG plots.")] = None,
    as_json: Json = None,
    resume: engines.Resume = None,
    loading: options.Loading,
    running: engines.Running,
    config: Config = None,
    **settings: Any,
) -> None:
    """Nats per token of rules on a text, beside each member and the averages, with paired intervals by document."""
    from softmeet.evaluation.choices import parse_choices, under_gates, with_baselines
    from softmeet.rules.settings import POOLS

    texts.require_extra(psutil=True, scipy=True, pyarrow=trace, matplotlib=plots)
    texts.require_places(as_json, plots, resume)
    found = reading.documents_unless(trace)
    _require_once(tried.rules or [], settings)
    ensemble = loading.ensemble(texts.default_members(members, trace), settings)
    own = ensemble.model.config
    prompt = tried.prompt_weights
    named = [*(tried.rules or [own.rule]), *([f"{POOLS[0]}:prompt_weights={prompt}"] if prompt else [])]
    gates = repeated("--gate", tried.gates) or ([own.gate] if own.gate and own.gate != "auto" else [])
    parsed = under_gates(parse_choices(named, len(ensemble.names), own.bands), gates)
    choices = with_baselines(parsed, own.weights or (), own.rule_temperature)
    from softmeet.evaluation.files import PieceCache
    from softmeet.evaluation.perplexity import evaluate_positions, evaluate_text
    from softmeet.evaluation.report import summary

    how = {
        "threads": running.threads,
        "choices": [asdict(choice) for choice in choices],
        "ensemble": own.settings.ungated().plain(),
    }
    positions, pinned = identified(ensemble, found, trace, reading)
    kept = PieceCache(resume, pinned | how)
    with (
        options.stoppable(after(resume)),
        running.start(ensemble) as engine,
        texts.progress() as begin,
    ):
        where: dict[str, Any] = {"engine": engine, "cache": kept}
        if positions is not None:
            advance = begin("evaluating", 0, len(positions))
            made = evaluate_positions(ensemble, positions, choices, **where, on_progress=advance)
        else:
            made = evaluate_text(
                ensemble, found or [], choices, **where, max_tokens=reading.max_tokens, **reading.windows,
                begin=lambda total: begin("evaluating", 0, total),
            )  # fmt: skip
        facts = summary(made)
    tell(facts, as_json, show)
    write(facts, as_json)
    if plots is not None:
        from softmeet.evaluation.plots import draw

        draw(facts, plots)


def _require_once(rules: list[str], settings: dict[str, Any]) -> None:
    """Refuse a setting that both a rule and a flag name; here, before anything is loaded.

    Raises:
        InvalidInputError: there is one; or a rule is none.
    """
    from softmeet.evaluation.choices import without_prompt
    from softmeet.rules.settings import parse_rule

    for rule in rules:
        _, named = parse_rule(without_prompt(rule)[0])
        if both := [name for name in named if settings.get(name) is not None]:
            flag = flag_of(both[0])
            raise InvalidInputError(f"{both[0]} is named twice, in the rule {rule!r} and by {flag}: leave one out")


def identified(
    ensemble: Ensemble, documents: Any, trace: Path | None, reading: texts.Reading
) -> tuple[Positions | None, dict[str, Any]]:
    """The positions of a trace, if there is one, and what a command's figures depend on, but for its own settings.

    Raises:
        InvalidInputError: the trace is of other members or damaged.
    """
    from softmeet.evaluation.trace import identity

    dtypes = [str(head.weight.dtype) for head in ensemble.model.member_heads]
    pinned = {**identity(ensemble), "dtypes": dtypes, "max_tokens": reading.max_tokens, **reading.windows}
    if trace is None:
        text = "".join(f"{document.name}\0{document.text}\0" for document in documents)
        return None, {**pinned, "source": hashlib.sha256(text.encode()).hexdigest()}
    from softmeet.evaluation.trace import Trace

    if set(reading.windows.values()) - {None, False}:
        raise InvalidInputError(
            "a trace has its windows: --window, --stride, --bos and --max-per-document go with --text"
        )
    opened = Trace.open(trace)
    opened.require(ensemble)
    positions, left_out = opened.read_whole(options.say)
    # Pieces are numbered over the positions that were read.
    damaged = {"shards left out": left_out} if left_out else {}
    return positions.take(slice(reading.max_tokens)), {**pinned, "source": opened.key, **damaged}


def after(resume: Path | None) -> str:
    """What is left of a command that was stopped."""
    if resume is None:
        return "nothing is kept; softmeet trace keeps what it has done, and so does --resume FOLDER"
    return f"finished pieces stay in {resume}; the same command goes on from there"


def tell(facts: dict[str, Any], to: Path | None, table: Callable[[dict[str, Any]], None]) -> None:
    """A table, or JSON where that goes to stdout (``-``); before anything is written, which may fail."""
    from softmeet.evaluation.files import as_json

    if to == Path("-"):
        typer.echo(as_json(facts))
    else:
        table(facts)


def write(facts: dict[str, Any], to: Path | None) -> None:
    """JSON to a file, if one is named."""
    from softmeet.evaluation.files import write_json

    if to not in (None, Path("-")):
        write_json(to, facts)


def show(facts: dict[str, Any]) -> None:
    """A table on the terminal."""
    spread = f"{facts['clusters']['count']} {facts['clusters']['kind']}"
    console = Console()
    unit = facts["vocabulary"]
    table = Table(title=f"{facts['tokens']:,} {unit}; intervals by {spread}")
    table.add_column("", min_width=14, overflow="fold")
    gated = any(row["gated"] for row in facts["rules"].values())
    for name in ("nats", "perpl.", "bits/B", "top-1", "cal.", *(["gated"] if gated else []), "vs best baseline"):
        table.add_column(name, no_wrap=True)
    best = facts["best_baseline"]
    for kind in ("members", "rules"):
        for name, row in facts[kind].items():
            bits = _number(row["bits_per_byte"], ".4f") if row["bits_per_byte"] is not None else ""
            table.add_row(
                escape(options.short(name) if kind == "members" else name), _number(row["nll"], ".4f"),
                _number(row["perplexity"], ".2f" if row["perplexity"] < 1e6 else ".3g"),
                bits, f"{row['top1']:.3f}", f"{row['calibration']['error']:.3f}",
                *([f"{row['gated']:.1%}" if row.get("gated") else ""] if gated else []), _against(name, row, best),
            )  # fmt: skip
        table.add_section()
    # Cells rather lose their padding than their ends.
    if console.measure(table, options=console.options.update(max_width=sys.maxsize)).maximum > console.width:
        table.padding = 0
    console.print(table)
    for name, row in facts["rules"].items():
        for note in _notes(row):
            console.print(f"{name}: {note}", markup=False)
    console.print(
        f"members disagree by {facts['disagreement']:.3f} nats a {unit[:-1]} (Jensen-Shannon); differences are 95 %, "
        "negative is better"
    )


def _number(x: float, form: str) -> str:
    return format(x, form).replace("inf", "∞")


def _against(name: str, row: dict[str, Any], best: str) -> str:
    if name == best:
        return "is it"
    if "vs" not in row:
        return ""
    low, high = row["vs"]["ci95"]
    interval = _number(row["vs"]["delta"], "+.4f")
    return interval + (f" ± {(high - low) / 2:.4f}" if math.isfinite(high - low) else "")


def _notes(row: dict[str, Any]) -> list[str]:
    notes = [f"{row['fallbacks']:,} by meet"] if row["fallbacks"] else []
    notes += [f"{row['unconverged']:,} not converged"] if row["unconverged"] else []
    return [", ".join(notes)] * bool(notes) + ([row["movement"]["says"]] if "movement" in row else [])
