"""Compare all rules where the true distribution is known, and on text: python benchmarks/study.py real OUT --smoke

It writes tables, plots and a report to the folder OUT. The same command again goes on where one was stopped.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from cells import Json, Run
from softmeet.cli import options, texts
from softmeet.cli.flags import flag, flags, optional
from softmeet.cli.messages import stoppable
from softmeet.cli.progress import progress, working
from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.documents import Document, read_documents
from softmeet.evaluation.held_out import held_out_books
from softmeet.evaluation.positions import observe_text
from softmeet.evaluation.premise import premise_at
from softmeet.scaling.base import Engine
from studies import text as on_text
from studies.known_truth import SMOKE_KNOWN_TRUTH, SMOKE_SYNTHETIC, KnownTruthStudy, SyntheticStudy
from studies.report import Report
from studies.text import TextStudy

study = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Out = Annotated[Path, typer.Argument(help="The folder of the study; run the same command again to resume.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="A trial run of about a minute, too small to conclude from.")]
_DOCUMENT = "A UTF-8 file, which is one document; it can be repeated."
_BOOKS = "the bundled members' held-out books"
Text = Annotated[list[Path] | None, typer.Option("--text", "-t", metavar="PATH", help=_DOCUMENT, show_default=_BOOKS)]
Seed = Annotated[int, typer.Option(help="The seed of the random heads.")]
Count = Annotated[int, typer.Option(min=2, help="Tokens to score the averages on, spread over the text.")]
Meet = Annotated[int, typer.Option(min=0, help="How many of the --positions to score meet on, at each trust.")]
Exact = Annotated[int, typer.Option(min=0, help="How many of the --positions to score max-entropy on.")]
Slow = Annotated[
    int, typer.Option(min=0, help="How many of the --positions, at least 2, to score the other rules on; 0 for none.")
]


@study.command()
@flags()
def synthetic(*, out: Out, smoke: Smoke = False, seed: Seed = 0, running: options.EngineFlags) -> None:
    """Compare rules on random heads, where the true distribution is known, without and with noise on hidden states.

    n members have heads of width d for v tokens, with nd/v from 1/16 to 5/4.
    """
    tier = dataclasses.replace(SMOKE_SYNTHETIC if smoke else SyntheticStudy(), seed=seed)
    with running.start(None) as engine:
        _run(out, dataclasses.asdict(tier), tier.cells(), tier.report, engine)


@study.command("known-truth")
@flags()
def known_truth(*, out: Out, text: Text = None, smoke: Smoke = False, running: options.EngineFlags) -> None:
    """Compare rules with the bundled families' heads: wide's predictions count as the truth, which narrow approximates.

    Each narrow head gets the hidden state that brings its prediction closest to that of the family wide.
    """
    documents = _documents(text)
    tier = SMOKE_KNOWN_TRUTH if smoke else KnownTruthStudy()
    members = tier.load()
    with running.start(members) as engine:
        _run(out, dataclasses.asdict(tier), tier.cells(documents, members), tier.report, engine)


@study.command()
@flags()
def real(
    *,
    out: Out,
    text: Text = None,
    smoke: Smoke = False,
    family: str | None = optional("narrow or wide.", shown="both, each in its own subfolder"),
    positions: Count = 4000,
    meet: Meet = 4000,
    exact: Exact = 4000,
    slow: Slow = 500,
    running: options.EngineFlags,
) -> None:
    """Compare rules with the bundled families on text, for several trusts and numbers of members.

    It also tests whether members' errors are those of a narrow head, and lets every rule continue a prompt.
    """
    documents = _documents(text)
    for name in [family] if family else ["narrow", "wide"]:
        full = TextStudy(positions, meet, exact, slow, sizes=(2, 3) if name == "narrow" else ())
        ensemble = options.LoadingFlags().ensemble([name])
        _on_text(out if family else out / name, ensemble, on_text.SMOKE if smoke else full, documents, None, running)


@study.command()
@flags()
def pretrained(
    *,
    out: Out,
    members: options.Members = None,
    text: list[Path] | None = optional(_DOCUMENT, "--text", "-t"),
    trace: Path | None = optional(
        "The folder of a trace by softmeet trace, in place of --text. Without -m, the members of the trace are used; "
        "with it, name the same ones in the same order."
    ),
    positions: Count = 4000,
    meet: Meet = 1000,
    exact: Exact = 500,
    slow: Slow = 100,
    prompt: str = flag("def main(", "The text that every rule continues."),
    tokens: int = flag(40, "How many tokens each rule adds to --prompt; 0 for none.", min=0),
    premise: int = flag(
        0,
        "On how many tokens to test whether members' errors come from narrow heads, as softmeet check --text does "
        "(slow for wide heads); 0 for no test.",
        min=0,
    ),
    only: str | None = optional(
        "With --trace: use only documents whose file names match this pattern, such as '*.py'.", shown="all"
    ),
    loading: options.LoadingFlags,
    running: options.EngineFlags,
) -> None:
    """Compare rules with any members on any text, given by --text or --trace; the tables are those of real."""
    named = texts.SourceFlags(trace=trace).members(members)
    if not named or (text is None) == (trace is None):
        given = {"--member": members, "--text": text, "--trace": trace}
        came = ", ".join(name for name, value in given.items() if value) or "none of these"
        raise InvalidInputError(
            f"expected --member and --text, or --trace, whose members are taken if none are named, got {came}"
        )
    settings = TextStudy(positions, meet, exact, slow, rows=8, prompt=prompt, tokens=tokens, premise=premise, only=only)
    documents = read_documents(text) if text else []
    _on_text(out, loading.ensemble(named), settings, documents, trace, running)


def _on_text(
    out: Path,
    ensemble: Ensemble,
    settings: TextStudy,
    documents: list[Document],
    trace: Path | None,
    running: options.EngineFlags,
) -> None:
    """Run a study of rules on a text, or on a trace of the same members, and write its results, plots and report."""
    traced, pinned = texts.SourceFlags(trace=trace).identified(ensemble, documents)
    with running.start(ensemble) as engine:
        if traced is not None:
            positions = on_text.chosen(traced, settings.only)
        else:
            with working("running the members"):
                # Twice the positions needed; those that are scored are spread evenly over them.
                each = -(-2 * settings.positions // len(documents))
                positions = observe_text(ensemble, documents, bos=True, max_per_document=each, engine=engine)
        few = on_text.spread(positions, settings.premise)
        with working("testing the premise"):
            premises = premise_at(ensemble, [(few.hidden, few.targets)]) if settings.premise else []
        source = f"{trace or 'text'}: {len(positions):,} positions of {len(positions.document.unique())} documents"
        _run(
            out,
            dataclasses.asdict(settings) | pinned | {"text": source},
            settings.cells(ensemble, positions),
            lambda results, command: settings.report(source, results, command, premises),
            engine,
        )


def _documents(text: list[Path] | None) -> list[Document]:
    """The documents in files, or the bundled members' held-out books if none is named."""
    return read_documents(text) if text else held_out_books()


def _run(
    out: Path,
    settings: dict[str, Any],
    cells: Iterable[tuple[str, Callable[[], Json]]],
    report: Callable[[dict[str, Any], str], Report],
    engine: Engine,
) -> None:
    """Compute the cells of a study that its folder does not hold yet, and write its report there.

    Args:
        out: the study's folder.
        settings: all that the results depend on, as JSON has it; a folder of other settings is refused.
        cells: (name, function that computes the cell's results) of each.
        report: makes the report from all cells' results by name and the command line.
        engine: runs the cells.
    """
    run = Run(out, settings)
    with working("preparing"):
        work = dict(cells)
    with (
        stoppable(f"finished cells stay in {out}; the same command goes on from there"),
        progress() as begin,
    ):
        advance = begin("cells", 0, len(work))
        results = run.each(work, engine, lambda key: advance(1))
    found = report(results, shlex.join(["python", *sys.argv]))
    run.finish(found.json())
    typer.echo(str(found.write(out)))
    for claim in found.claims:
        typer.echo(f"- {claim}")


if __name__ == "__main__":
    study()
