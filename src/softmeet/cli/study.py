"""``softmeet study``: compare all rules where the true distribution is known, and on text; it can be resumed."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softmeet.cli import options, texts
from softmeet.cli.flags import Command, flag, flags
from softmeet.cli.help import Commands
from softmeet.cli.messages import stoppable
from softmeet.cli.progress import progress, working
from softmeet.errors import InvalidInputError
from softmeet.extras import require_extra

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.evaluation.documents import Document
    from softmeet.evaluation.files import Json
    from softmeet.evaluation.study.report import Report
    from softmeet.evaluation.study.text import TextStudy
    from softmeet.scaling.base import Engine

study = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    help="Compare all rules, both where the true distribution is known and on text. It writes tables, plots and a "
    "report.",
    no_args_is_help=True,
)

_DOCUMENT = "A UTF-8 file, which is one document; it can be repeated."
_BOOKS = "the bundled members' held-out books"
Out = Annotated[Path, typer.Argument(help="The folder of the study; run the same command again to resume.")]
Smoke = Annotated[
    bool,
    typer.Option(
        "--smoke", help="A small trial run of about a minute, too small to conclude from.", rich_help_panel="Study"
    ),
]
Text = Annotated[
    list[Path] | None,
    typer.Option("--text", "-t", metavar="PATH", help=_DOCUMENT, show_default=_BOOKS, rich_help_panel="Text"),
]
Seed = Annotated[int, typer.Option(metavar="N", help="The seed of the random heads.", rich_help_panel="Study")]
Count = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=2,
        help="How many tokens to score the averages on, spread over the text.",
        rich_help_panel="Study",
    ),
]
Meet = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, help="How many of the --positions to score meet on, at each trust.", rich_help_panel="Study"
    ),
]
Exact = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, help="How many of the --positions to score max-entropy on.", rich_help_panel="Study"
    ),
]
Slow = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        help="How many of the --positions, at least 2, to score the other rules on, which are slow; 0 for none.",
        rich_help_panel="Study",
    ),
]


@study.command(cls=Command)
@flags()
def synthetic(*, out: Out, smoke: Smoke = False, seed: Seed = 0, running: options.EngineFlags) -> None:
    """Compare rules on random heads, where the true distribution is known, without and with noise on hidden states.

    n members have heads of width d for v tokens, with nd/v from 1/16 to 5/4.

    Example: softmeet study synthetic my-study --smoke
    """
    require_extra("study", "eval", "matplotlib", "psutil", "scipy")
    from softmeet.evaluation.study.known_truth import SMOKE_SYNTHETIC, SyntheticStudy

    tier = dataclasses.replace(SMOKE_SYNTHETIC if smoke else SyntheticStudy(), seed=seed)
    with running.start(None) as engine:
        _run(out, dataclasses.asdict(tier), tier.cells(), tier.report, engine)


@study.command("known-truth", cls=Command)
@flags()
def known_truth(*, out: Out, text: Text = None, smoke: Smoke = False, running: options.EngineFlags) -> None:
    """Compare rules with the bundled families' heads: wide's predictions count as the truth, which narrow approximates.

    Each narrow head gets the hidden state that brings its prediction closest to that of the family wide.

    Example: softmeet study known-truth my-study --smoke
    """
    require_extra("study", "eval", "matplotlib", "psutil", "scipy")
    from softmeet.evaluation.study.known_truth import SMOKE_KNOWN_TRUTH, KnownTruthStudy

    documents = _documents(text)
    tier = SMOKE_KNOWN_TRUTH if smoke else KnownTruthStudy()
    members = tier.load()
    with running.start(members) as engine:
        _run(out, dataclasses.asdict(tier), tier.cells(documents, members), tier.report, engine)


@study.command(cls=Command)
@flags()
def real(
    *,
    out: Out,
    text: Text = None,
    smoke: Smoke = False,
    family: str | None = flag(
        None, "The bundled family: narrow or wide.", shown="both, each in its own subfolder", panel="Members"
    ),
    positions: Count = 4000,
    meet: Meet = 4000,
    exact: Exact = 4000,
    slow: Slow = 500,
    running: options.EngineFlags,
) -> None:
    """Compare rules with the bundled families on text, for several trusts and numbers of members.

    It also tests whether members' errors are those of a narrow head, and lets every rule continue a prompt.

    Example: softmeet study real my-study --smoke
    """
    require_extra("study", "eval", "matplotlib", "psutil", "scipy")
    from softmeet.evaluation.study.text import SMOKE, TextStudy

    documents = _documents(text)
    for name in [family] if family else ["narrow", "wide"]:
        full = TextStudy(positions, meet, exact, slow, sizes=(2, 3) if name == "narrow" else ())
        ensemble = options.LoadingFlags().ensemble([name])
        _on_text(out if family else out / name, ensemble, SMOKE if smoke else full, documents, None, running)


@study.command(cls=Command)
@flags()
def pretrained(
    *,
    out: Out,
    members: options.Members = None,
    text: list[Path] | None = flag(None, _DOCUMENT, "--text", "-t", panel="Text"),
    trace: Path | None = flag(
        None,
        "The folder of a trace by softmeet trace, in place of --text. Without -m, the members of the trace are used; "
        "with it, name the same ones in the same order.",
        panel="Text",
    ),
    positions: Count = 4000,
    meet: Meet = 1000,
    exact: Exact = 500,
    slow: Slow = 100,
    prompt: str = flag("def main(", "The text that every rule continues.", shown="'def main('", panel="Study"),
    tokens: int = flag(40, "How many tokens each rule adds to --prompt; 0 for none.", min=0, panel="Study"),
    premise: int = flag(
        0,
        "On how many tokens to test whether members' errors come from narrow heads, as softmeet check --text does "
        "(slow for wide heads); 0 for no test.",
        min=0,
        panel="Study",
    ),
    only: str | None = flag(
        None,
        "With --trace: use only documents whose file names match this pattern, such as '*.py'.",
        shown="all",
        panel="Text",
    ),
    loading: options.LoadingFlags,
    running: options.EngineFlags,
) -> None:
    """Compare rules with any members on any text; it writes the same kinds of tables as softmeet study real.

    Give --text or --trace.

    Example: softmeet study pretrained my-study -m wide/gpt2 -m wide/llama --text held-out.txt
    """
    require_extra("study", "eval", "matplotlib", "psutil", "scipy", *["pyarrow"] * bool(trace))
    from softmeet.evaluation.study.text import TextStudy

    named = texts.SourceFlags(trace=trace).members(members)
    if not named or (text is None) == (trace is None):
        given = {"--member": members, "--text": text, "--trace": trace}
        came = ", ".join(name for name, value in given.items() if value) or "none of these"
        raise InvalidInputError(
            f"expected --member and --text, or --trace, whose members are taken if none are named, got {came}"
        )
    settings = TextStudy(
        positions, meet, exact, slow, rows=8, prompt=texts.argument_text(prompt), tokens=tokens, premise=premise,
        only=only,
    )  # fmt: skip
    documents = _documents(text) if text else []
    _on_text(out, loading.ensemble(named), settings, documents, trace, running)


def _on_text(
    out: Path,
    ensemble: Ensemble,
    settings: TextStudy,
    documents: list[Document],
    trace: Path | None,
    running: options.EngineFlags,
) -> None:
    """Run a study of rules on a text or a trace, and write its results, plots and report.

    Args:
        out: the study's folder.
        ensemble: the members.
        settings: the numbers of positions, and the other settings of the study.
        documents: the text; empty if there is a trace.
        trace: a trace of the same members in place of the text; None for none.
        running: the flags for the engine.
    """
    from softmeet.evaluation.positions import observe_text
    from softmeet.evaluation.premise import premise_at
    from softmeet.evaluation.study import text as tier

    traced, pinned = texts.SourceFlags(trace=trace).identified(ensemble, documents)
    with running.start(ensemble) as engine:
        if traced is not None:
            positions = tier.chosen(traced, settings.only)
        else:
            with working("running the members"):
                # Twice the positions needed; those that are scored are spread evenly over them.
                each = -(-2 * settings.positions // len(documents))
                positions = observe_text(ensemble, documents, bos=True, max_per_document=each, engine=engine)
        few = tier.spread(positions, settings.premise)
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
    """Return the documents in files, or the bundled members' held-out books if none is named."""
    from softmeet.evaluation.documents import read_documents
    from softmeet.evaluation.held_out import held_out_books

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
    from softmeet.evaluation.files import Run

    run = Run(out, settings)
    with working("preparing"):
        work = dict(cells)
    with (
        stoppable(f"finished cells stay in {out}; the same command goes on from there"),
        progress() as begin,
    ):
        advance = begin("cells", 0, len(work))
        results = run.each(work, engine, lambda key: advance(1))
    found = report(results, shlex.join(["softmeet", *sys.argv[1:]]))
    run.finish(found.json())
    typer.echo(str(found.write(out)))
    for claim in found.claims:
        typer.echo(f"- {claim}")
