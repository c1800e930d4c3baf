"""Work that can be suspended and go on later, so that a rule that takes long holds up no other sequence.

A solve may take a hundred times as long as the members' step. It therefore runs as a *task*, on a stack of its own
(a greenlet) in the batcher's thread: between its steps a solver asks whether its time is over
(:func:`softmeet.solvers.clock.time_is_over`), and there the task can be suspended, however deep in the solver's code.
Tasks take turns. In each round of the batcher every task may take about as long as everything else in the round takes,
so that it at most doubles what others wait for, and none of its work is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import greenlet

from softmeet.server.sequences import Sequence
from softmeet.solvers.clock import time_limit

# In seconds: how long a task goes on before the batcher looks for new work, while no sequence waits for its next step.
_LOOK = 0.02


class Task:
    """A piece of work for some sequences that can be suspended; made and run in one thread.

    Args:
        rows: the sequences.
        work: a function that is called with this task; it may call :meth:`pause`, and solves within :meth:`limit`.
        is_quick: whether the work takes next to no time.

    Attributes:
        rows: the sequences.
        is_quick: as given.
        ended: whether the work has ended, by its end, by an exception or by :meth:`end`.
        suspended: the seconds for which it has been suspended so far.
    """

    def __init__(self, rows: list[Sequence], work: Callable[[Task], None], *, is_quick: bool = False) -> None:
        self.rows, self.is_quick, self.suspended, self.ended = rows, is_quick, 0.0, False
        self._batcher, self._own = greenlet.getcurrent(), greenlet.greenlet(work)
        self._credit = self._turn_ends = 0.0

    def run(self, share: float) -> None:
        """Let the work go on for about ``share`` seconds; an exception of the work is raised here.

        A piece of work without a pause may take longer. The work then waits until its shares have made up for that.
        """
        self._credit = min(self._credit, 0.0) + (share or _LOOK)
        if self._credit <= 0:
            return
        started = time.perf_counter()
        self._turn_ends = started + self._credit
        try:
            self._own.switch(self) if not self._own else self._own.switch()
        finally:
            self.ended = self._own.dead
            self._credit -= time.perf_counter() - started

    def pause(self) -> None:
        """Suspend the work here if its turn has ended; called by the work itself."""
        now = time.perf_counter()
        if now >= self._turn_ends:
            self._batcher.switch()
            self.suspended += time.perf_counter() - now

    def limit(self, seconds: float) -> AbstractContextManager[None]:
        """Return a context in which solvers pause between steps, and end after ``seconds`` of the task's own time."""
        end = self.clock() + seconds

        def over() -> bool:
            if self.clock() >= end:
                return True
            self.pause()
            return False

        return time_limit(over)

    def clock(self) -> float:
        """Return a time in seconds that stands still while the task is suspended."""
        return time.perf_counter() - self.suspended

    def end(self) -> None:
        """End the work where it is suspended, as if the function had returned there."""
        self._own.throw()
        self.ended = True
