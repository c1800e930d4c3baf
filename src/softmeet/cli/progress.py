"""Progress of long work on stderr: bars on a terminal, and elsewhere a line every ten seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from softmeet.cli.messages import err, say
from softmeet.cli.terminal import harmless
from softmeet.suspended import Control

# Seconds between two lines.
EVERY = 10.0
# Seconds from which speed is estimated: a piece of work may take minutes.
_PERIOD = 3600.0
# Names may have brackets, which are no markup.
_NAME = TextColumn("{task.description}", markup=False)


class _Done(MofNCompleteColumn):
    """How much is done, where work has a known total: else there is nothing to be counted."""

    def render(self, task: Task) -> Text:
        """Return the numbers, such as ``3/9``."""
        return super().render(task) if task.total is not None else Text()


class _Left(ProgressColumn):
    """The time that is left, where it can be told: until a first piece of work is done nothing is known of it."""

    def render(self, task: Task) -> str:
        """Return the time, such as ``0:00:09 left``."""
        return f"{timedelta(seconds=task.time_remaining)} left" if task.time_remaining else ""


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], Callable[[int], None]]]:
    """Show the progress of counted work while the context lasts: its name, number, total, time taken and time left.

    Yields:
        a function of (name, number done, total number, None if unknown) that begins a piece of work, and ends the one
        before; it returns a function of one number, by which each call of it advances the work.
    """
    # The time taken goes on while a piece takes minutes, when the time left stands still.
    with _shown(_NAME, BarColumn(), _Done(), TimeElapsedColumn(), _Left()) as bars:

        def begin(name: str, done: int, total: int | None) -> Callable[[int], None]:
            for before in bars.tasks:  # which has ended, perhaps before its total, as fits do that converge
                bars.update(before.id, total=before.completed, visible=False)
            task = bars.add_task(harmless(name), completed=done, total=total)
            return lambda count: bars.advance(task, count)

        yield begin


@contextmanager
def working(name: str, *, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Show that uncounted work goes on while the context lasts: its name and the time that it has taken.

    Args:
        name: the work's.
        shown: whether it is shown.

    Yields:
        a function that changes the name.
    """
    if not shown:
        yield lambda text: None
        return
    with _shown(SpinnerColumn(), _NAME, TimeElapsedColumn()) as bars:
        task = bars.add_task(harmless(name), total=None)
        yield lambda text: bars.update(task, description=harmless(text))


@contextmanager
def reading() -> Iterator[Control]:
    """Show how much of a long text is read, until all of it is; nothing is shown of a short one.

    Yields:
        the control of what reads it.
    """
    with ExitStack() as shown:
        told: Callable[[str], None] | None = None

        def hear(done: int, total: int) -> None:
            nonlocal told
            if done == total:
                # What is read later, while an answer is printed, is not shown.
                own.hear = lambda done, total: None
                shown.close()
                return
            told = told or shown.enter_context(working("reading"))
            told(f"reading: {done / total:.0%}")

        own = Control(hear)
        yield own


@contextmanager
def _shown(*columns: ProgressColumn) -> Iterator[Progress]:
    """Show rich's bars of these columns on a terminal; elsewhere print a line for each unfinished task now and then."""
    bars = Progress(*columns, console=err, transient=True, disable=not err.is_terminal, speed_estimate_period=_PERIOD)
    ended = threading.Event()

    def print_lines() -> None:
        while not ended.wait(EVERY):
            for line in [_line(task) for task in bars.tasks if not task.finished]:
                say(line)

    printer = threading.Thread(target=print_lines, daemon=True)
    with bars:
        if bars.disable:
            printer.start()
        try:
            yield bars
        finally:
            ended.set()


def _line(task: Task) -> str:
    """Return a sentence on a task, such as ``reading, in bytes: 420 of 2,000 after 50 s, about 0:03:10 left``."""
    if not (task.completed or task.total):
        return f"{task.description}: {task.elapsed or 0:.0f} s"
    total = f" of {int(task.total):,}" if task.total else ""
    left = f", about {timedelta(seconds=task.time_remaining)} left" if task.time_remaining else ""
    return f"{task.description}: {int(task.completed):,}{total} after {task.elapsed or 0:.0f} s{left}"
