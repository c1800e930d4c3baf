"""Work that can be suspended and go on later, so that a rule that takes long holds up no other sequence.

A solve may take a hundred times as long as the members' step. It therefore runs as a *task*, on a stack of its own
(a greenlet) in the batcher's thread: between its steps a solver asks whether its time is over
(:func:`softmeet.solvers.clock.time_is_over`), and there the task can be suspended, however deep in the solver's code.

Tasks take turns. In each round of the batcher every request has about as long for its tasks as the members' step took,
divided by the number of its sequences that were run in it, and all tasks together twice as long as the step, so that
whatever others ask for at most triples what a sequence waits for; and no work is lost. What prompts leave of their time
they may use later, so that prompts which come together are read together, and their sequences then run in one batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import greenlet

from softmeet.server.sequences import Account, Sequence
from softmeet.solvers.clock import time_limit

# In seconds: how long a task goes on before the batcher looks for new work, while no sequence waits for its next step.
_LOOK = 0.02
# How much longer all tasks together may take than the rest of a round, while a sequence waits for the next one.
_MOST = 2.0
# The shortest share of the time, in seconds.
_LEAST = 0.001
# How much of the time may be saved for later rounds, in seconds.
SAVED = 0.3


class Task:
    """A piece of work for some sequences that can be suspended; made and run in one thread.

    Args:
        rows: the sequences.
        work: a function that is called with this task; it may call :meth:`pause`, and solves within :meth:`limit`.
        kind: what it is about: those who add tasks may wait for one of a kind to end; None if nobody does.

    Attributes:
        rows, kind: as given.
        expired: whether a time :meth:`limit` of the work has been over.
        ended: whether the work has ended, by its end, by an exception or by :meth:`end`.
        suspended: the seconds for which it has been suspended so far.
    """

    def __init__(self, rows: list[Sequence], work: Callable[[Task], None], kind: Any = None) -> None:
        self.rows, self.kind, self.suspended = rows, kind, 0.0
        self.expired = self.ended = False
        self._batcher, self._own = greenlet.getcurrent(), greenlet.greenlet(work)
        self._turn_ends = 0.0

    def run(self, seconds: float) -> None:
        """Let the work go on for about so many seconds, longer if it does not pause; its exceptions are raised here."""
        self._turn_ends = time.perf_counter() + seconds
        try:
            self._own.switch(*() if self._own else (self,))
        finally:
            self.ended = self._own.dead

    @property
    def accounts(self) -> list[Account]:
        """The accounts of its sequences' requests."""
        return [s.account for s in self.rows]

    @property
    def left(self) -> float:
        """The seconds that are left to the request that has the most."""
        return max(account.left for account in self.accounts)

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
                self.expired = True
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


class Turns:
    """The tasks of a batcher, which take turns.

    Args:
        run: a function that lets a task go on for some seconds (:meth:`Task.run`), and raises nothing.
        saving: an account that has its share in every round, with tasks or without.
    """

    def __init__(self, run: Callable[[Task, float], None], saving: Account) -> None:
        self._run, self._tasks, self._saving = run, list[Task](), saving
        self._all = Account(SAVED, saves=SAVED)

    def __len__(self) -> int:
        """Return the number of tasks that have not ended, but for one that is running."""
        return len(self._tasks)

    @property
    def kinds(self) -> set[Any]:
        """The kinds of the tasks that have not ended."""
        return {task.kind for task in self._tasks}

    def add(self, task: Task) -> None:
        """Add a task, whose turn comes after those of all others."""
        self._tasks.append(task)

    def take(self, seconds: float, waited_for: Callable[[], bool], stepped: Collection[Account] = ()) -> None:
        """Let tasks go on, each request's for its share of the round's time; what they take longer, it owes.

        Args:
            seconds: what the rest of the round has taken.
            waited_for: returns whether any sequence waits for the next round; if not, tasks take further turns for
                some hundredths of a second, after which there may be new work.
            stepped: the account of each sequence that this was for. A share is ``seconds``, divided by how often the
                request's account is among them, if it is.
        """
        look, owners = time.perf_counter() + _LOOK, Counter(map(id, stepped))
        self._all.add(_MOST * max(seconds, _LEAST))
        while True:
            sharing = [self._saving, *(account for task in self._tasks for account in task.accounts)]
            for account in {id(account): account for account in sharing}.values():
                account.add(max(seconds / max(owners[id(account)], 1), _LEAST))
            for task in [task for task in self._tasks if task.left > 0]:
                # Tasks of one account follow each other; one that has to wait keeps its place.
                if task.left > 0 and (self._all.left > 0 or not waited_for()):
                    self._tasks.remove(task)
                    self._charge(task)
                    self._tasks += [] if task.ended else [task]
            if waited_for():
                return
            # Nobody has waited for what they took.
            self._all.left = max(self._all.left, 0.0)
            if not self._tasks:
                self._all.left, self._saving.left = self._all.saves, self._saving.saves
            if not self._tasks or time.perf_counter() > look:
                return

    def _charge(self, task: Task) -> None:
        """Let a task go on for what is left to its sequences, and charge them for the time.

        Sequences whose task takes more than one turn use the account of their request from then on, with what they owe.
        """
        started, accounts = time.perf_counter(), {id(account): account for account in task.accounts}
        self._run(task, task.left)
        spent = time.perf_counter() - started
        self._all.left -= spent
        for account in accounts.values():
            account.left -= spent
        if not task.ended:
            for s in task.rows:
                own = s.request.account
                own.left = min(own.left, s.account.left)
                s.account = own

    def drop(self) -> None:
        """End every task whose sequences have all ended."""
        for task in list(self._tasks):
            if all(s.done for s in task.rows):
                task.end()
                self._tasks.remove(task)
