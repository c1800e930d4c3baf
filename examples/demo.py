"""See in half a minute what softmeet does: ``make demo``, or, with softmeet-zoo and the extra demo, python
examples/demo.py.

Text that no bundled model has seen is scored, one prompt is continued by several rules, and two models of different
vocabularies by one. Seeds are fixed, so everyone sees the same.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from softmeet.startup import quick_imports

with quick_imports():
    from softmeet import Ensemble
    from softmeet.evaluation.choices import parse_choices
    from softmeet.evaluation.documents import Document
    from softmeet.evaluation.held_out import held_out_books
    from softmeet.evaluation.intervals import Difference, clusters, paired
    from softmeet.evaluation.perplexity import evaluate_text
    from softmeet.evaluation.scores import Evaluation
    from softmeet.hf.report import style

PROMPT, SEED = "And the king said unto his daughter,", 1
AVERAGE, MEET = "logit-mean", "meet:trust=1"
FOLDER = Path("build/demo")
console = Console(highlight=False)


def main(
    tokens: Annotated[int, typer.Option(min=1, help="Of each continuation; over bytes, four times as many.")] = 60,
    per_book: Annotated[int, typer.Option(min=2, help="Tokens of each book that are scored.")] = 256,
) -> None:
    """Show on the bundled models what softmeet does, in about half a minute on two cores."""
    started = time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are tiny, and the last bits of sums depend on it
    loaded: dict[Any, Any] = {}  # the members, each of which is loaded once
    ensemble = Ensemble.from_pretrained("narrow", MEET, gate="none", loaded=loaded)
    books = held_out_books()[1::2]  # the ten between them were used to choose the trust
    found = score(ensemble, books, per_book)
    best = min(found.members, key=lambda name: found.members[name].mean)
    show_scores(found, best)

    console.print("\n[bold underline]2. One prompt, continued by each[/]")
    console.print(f"Drawn at random with seed {SEED}, not picked from several. The models are tiny.")
    show_legend()
    continue_prompt(best, Ensemble.from_pretrained([best], AVERAGE, gate="none", loaded=loaded), tokens)
    continue_prompt(AVERAGE, Ensemble.from_pretrained("narrow", AVERAGE, gate="none", loaded=loaded), tokens)
    continue_prompt(MEET, ensemble, tokens)

    mixed = Ensemble.from_pretrained("mixed", vocabulary="bytes", gate="none")
    sizes = " and ".join(f"{head.v:,}" for head in mixed.model.member_heads)
    console.print("\n[bold underline]3. Two models of different vocabularies, as one[/]")
    console.print(f"They have {sizes} tokens: byte by byte, what both expect next is averaged.")
    continue_prompt("mixed", mixed, 4 * tokens)
    show_commands(books)
    console.print(f"\nThe demo itself took {time.perf_counter() - started:.0f} seconds.")


def score(ensemble: Ensemble, books: list[Document], per_book: int) -> Evaluation:
    """Say what is compared, and score every member, both averages and meet on the beginning of each book."""
    head = ensemble.model.heads[0]
    console.print(
        "[bold underline]1. Text that the models have not seen[/]\n"
        f"{len(ensemble.names)} small models, the members, predict the first {per_book} tokens (words or parts of "
        f"words) of {len(books)} books of the King James Bible that none was trained on. They are scored in nats: -ln "
        "of the probability of the token that came. Lower is better.\n"
        f"{AVERAGE} is the logit average: the mean of the members' log-probabilities, made to sum to 1. prob-mean "
        f"averages probabilities. A member's head, its last layer, makes {head.v:,} of them from {head.d} numbers, so "
        "it cannot express every prediction. meet allows for that: it moves the logit average to where the members can "
        "agree. How far it trusts them, 1, was chosen on ten other books."
    )
    choices = parse_choices([AVERAGE, "prob-mean", MEET], len(ensemble.names))
    with Progress(console=console, transient=True) as bars:
        return evaluate_text(
            ensemble, books, choices, bos=True, max_per_document=per_book, begin=lambda total: shown_on(bars, total)
        )


def shown_on(bars: Progress, total: int) -> Callable[[int], None]:
    """Return a function that is told how many tokens more were scored: it moves a bar or, in a pipe, prints lines."""
    task = bars.add_task("scoring", total=total)

    def advance(count: int) -> None:
        bars.advance(task, count)
        if not console.is_terminal:
            console.print(f"scored {bars.tasks[0].completed:,.0f} of {total:,} tokens")

    return advance


def show_scores(found: Evaluation, best: str) -> None:
    """Print a table of the scores, and what it says in words."""
    within, baseline = clusters(found.positions.document), found.choices[AVERAGE].nats
    table = Table("", "nats/token", f"minus {AVERAGE}'s", caption=f"over {len(baseline):,} tokens; [95 % interval]")
    against = {}
    for name, scores in {**found.members, **found.choices}.items():
        against[name] = than = paired(scores.nats, baseline, within)
        difference = "" if name == AVERAGE else f"{than.mean:+.3f} \\[{than.low:+.3f}, {than.high:+.3f}]"
        table.add_row(name, f"{scores.mean:.3f}", difference)
    console.print(table)
    console.print(f"Intervals compare token by token, and take the {within.count} books as independent samples.")
    console.print(verdict(against[MEET], against[best]))


def verdict(meet: Difference, best: Difference) -> str:
    """Say in words what was found, from the differences of meet and of the best member to the logit average."""
    if not meet.excludes_zero:
        return "No gain shown: the interval of meet's difference to the logit average holds zero."
    if meet.mean > 0:
        return "On this text meet is worse than the logit average: the interval lies above zero."
    more, least, most = (f"{math.expm1(-nats):.1%}" for nats in (meet.mean, meet.high, meet.low))
    found = (
        f"Gain shown: meet gives the token that came {more} ({least} to {most}) more probability, in geometric mean."
    )
    saved = f" Averaging saves {best.mean:.3f} nats over the best member, and meet {-meet.mean:.3f} more."
    return found + saved * (best.mean > 0)


def show_legend() -> None:
    """Print in one line what the colours of tokens mean, where there are colours."""
    shades = [(f" {nats:g} ", style(nats)) for nats in (0.1, 0.25, 0.5)]
    if console.color_system and not console.no_color:
        console.print(Text.assemble("Colour: the members disagree by ", *shades, " nats or more"))


def continue_prompt(name: str, ensemble: Ensemble, count: int) -> None:
    """Continue the prompt by ``count`` tokens, and show each as it comes, coloured by the members' disagreement."""
    text = Text.assemble((f"\n{name}: ", "bold"), (PROMPT, "italic"))
    pieces = ensemble.stream_with_disagreement(PROMPT, max_new_tokens=count, do_sample=True, seed=SEED)
    with Live(text, console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for piece, nats in pieces:
            live.update(text.append(piece, style(nats)), refresh=True)
    if not console.is_terminal:  # where Live ends the line itself
        console.print()


def show_commands(books: list[Document]) -> None:
    """Print commands to go on with, which work as printed in this folder, and write the books that they read."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for book in books:
        (FOLDER / f"{book.name}.txt").write_text(book.text, encoding="utf-8")
    place = os.path.relpath(Path(sys.executable).parent)
    console.print("\n[bold underline]4. Go on[/]")
    for purpose, command in {
        "Look inside a text, on a page (without --html: in the terminal):":
            f'inspect "{PROMPT}" -m narrow --html {FOLDER}/page.html',
        "Evaluate two models on a text; put in the names or folders of your own, and your own files:":
            f'evaluate -m narrow/opt-a -m narrow/opt-c --text "{FOLDER}/*.txt" --max-per-document 256',
        "Serve them to OpenAI's clients, with a page at http://127.0.0.1:8000/ui, until Ctrl-C:":
            "serve -m narrow",
    }.items():  # fmt: skip
        console.print(purpose)
        console.print(f"  {place}/softmeet {command}", style="bold", markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
