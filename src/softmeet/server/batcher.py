"""The batcher: the one thread that runs a server's members, in batches that sequences join and leave at any token.

The thread works in *rounds*. A round begins the prompts of new sequences, runs each member once on the newest token of
all sequences that it takes part in, and combines the members' distributions and draws a token for each sequence, in
tasks that can be suspended: a sequence whose rule takes long leaves the round, and comes back when its token is drawn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch

from softmeet.engine.ask import Hidden, Members
from softmeet.engine.step import combined
from softmeet.errors import SoftmeetError
from softmeet.readers.reader import Reader
from softmeet.server.alone import alone
from softmeet.server.errors import BusyError, ClosingError, TooLateError, for_clients
from softmeet.server.gating import Gates
from softmeet.server.kinds import Kinds, prompts_together
from softmeet.server.limits import Limits
from softmeet.server.metrics import Metrics
from softmeet.server.sequences import Account, Event, Failed, Finished, PromptScored, Sequence, Token
from softmeet.server.tasks import SAVED, Task, Turns
from softmeet.server.tokens import drawn, scored, tokens_of
from softmeet.server.turns_at_lock import TURNS_AT_LOCK
from softmeet.solvers.base import Status
from softmeet.suspended import Control, StoppedError

_log = logging.getLogger("softmeet.server")
# The most prompt tokens that begin in one round, though at least one prompt does: running sequences wait for them.
_PROMPT_TOKENS_A_ROUND = 1024
_CLOSED = "the server is shutting down and ended this answer before its end: ask another one"
_LATE = "the answer was not done in time: ask for fewer tokens, or raise the server's --timeout"
# Statuses of tokens at which the rule did not reach its tolerance.
_UNSOLVED = (Status.NOT_CONVERGED.name, Status.BUDGET.name)
# Seconds between two lines of the access log on how far a long prompt is read.
_EVERY, _access_log = 5.0, logging.getLogger("softmeet.access")


class Batcher(threading.Thread):
    """The thread that owns a server's members and generates the tokens of all sequences, of any number of ensembles.

    In each round a member runs once for all sequences that it takes part in, whatever their ensembles; then the
    sequences with equal :class:`~softmeet.server.sequences.Combination` are solved together, and each gets one token.
    Sequences whose solve takes longer than the rest of the round are left out of the next ones until they are solved.
    Sequences submitted before ``start()`` wait in the queue. To end the thread, call :meth:`close`, then ``join()``.

    Args:
        readers: the members, as :func:`softmeet.server.ensembles.readers_of` makes them. Only sequences of these may be
            submitted.
        limits: how many sequences may run and wait, and for how long a rule may work on a token.
        metrics: all of its counters but ``requests`` and ``first`` are kept up to date, on the batcher's thread.
        parallel: whether the members of a round run at the same time, in a thread each; "auto" measures whether it
            pays.
        reproducible: whether every sequence is run and solved by itself, so that not a bit of its distributions depends
            on the others, except where time ends a solve.
        speculate: how many tokens are drafted at a time while a single sequence runs; "auto" for as many as pay, 0 for
            none.
        one_member: whether plain sampling by ``prob-mean`` draws each token from one member while a single one runs.

    Attributes:
        members, readers: the members, with the keys and values that they hold; those who read for them.
    """

    def __init__(
        self,
        readers: dict[Any, Reader],
        limits: Limits,
        metrics: Metrics,
        *,
        parallel: bool | Literal["auto"] = False,
        reproducible: bool = False,
        speculate: int | Literal["auto"] = 0,
        one_member: bool = False,
    ) -> None:
        super().__init__(name="softmeet-batcher", daemon=True)
        self.limits, self.metrics, self.readers, self._reproducible = limits, metrics, readers, reproducible
        self.members = Members(len(readers), parallel=parallel, reproducible=reproducible)
        self._gates = Gates(self.members, self.metrics)
        self._kinds = Kinds(alone=reproducible)
        parts = self.members, self._give, self._gates.saved, metrics, limits
        self._alone = partial(alone, *parts, speculate=speculate, one_member=one_member)
        self._waiting: deque[Sequence] = deque()
        # Sequences that have a place; of those that are yet to be solved, the hidden states at the newest token.
        self._running: list[Sequence] = []
        self._unsolved: dict[Sequence, Hidden] = {}
        # Who sends one request after the other gets no further than who sends a long one.
        self._prompts, self._newcomers = Account(SAVED, saves=SAVED), Account()
        self._turns = Turns(lambda task, seconds: self._guarded(task.rows, task.run, seconds), self._prompts)
        self.metrics.watch(self._waiting, self._running, readers.values())
        self._wake = threading.Condition()
        self._closing, self._last_call = False, float("inf")

    @property
    def alive(self) -> bool:
        """Whether the thread is running and :meth:`close` has not been called."""
        return self.is_alive() and not self._closing

    @property
    def has_room(self) -> bool:
        """Whether the batcher is alive and would accept one more sequence now."""
        return self.alive and self._free() > 0

    def _free(self) -> int:
        """Return how many more sequences would be accepted: free places in the running batch and in the queue."""
        return self.limits.rows - len(self._running) + self.limits.waiting - len(self._waiting)

    def submit(self, sequences: list[Sequence]) -> None:
        """Append sequences to the queue: all of them, or none if there is no room for all.

        Args:
            sequences: new ones, usually a request's; ``emit`` of each gets its events, on the batcher's thread.

        Raises:
            BusyError: if there are more sequences than free places in the batch and the queue.
            ClosingError: if :meth:`close` has been called.
        """
        with self._wake:
            if self._closing:
                raise ClosingError("the server is shutting down: ask another one, or again later")
            more, places, free = len(sequences), self.limits.rows + self.limits.waiting, self._free()
            if more > free:
                raise BusyError(
                    f"the server is full: this request needs {more} of its {places} places, and {free} "
                    f"{'is' if free == 1 else 'are'} free: ask again later"
                )
            for s in sequences:
                model: Any = s.model
                s.readers = [self.readers[model.key_of(i)] for i in range(len(model.members))] + [*model.claimants]
            self._waiting += sequences
            self._wake.notify()

    def close(self, grace: float) -> None:
        """Accept no more sequences from now on, and return at once; the thread ends when its last sequence does.

        Args:
            grace: seconds from now, 0 or more, after which sequences that have not ended, queued or running, fail with
                ClosingError.
        """
        with self._wake:
            self._closing, self._last_call = True, time.monotonic() + grace
            self._wake.notify()

    def run(self) -> None:
        """Run rounds until :meth:`close` has been called and every sequence has ended.

        It is the thread's body: callers use ``start()``. If a round fails as a whole, the error is logged, all running
        sequences end with the event :class:`~softmeet.server.sequences.Failed`, and the next round follows.
        """
        with torch.inference_mode():
            while (new := self._admit()) is not None:
                TURNS_AT_LOCK.beside(len(self._running), self)
                self._guarded(self._running, self._round, new)
        TURNS_AT_LOCK.beside(0, self)

    def _guarded(self, rows: list[Sequence], work: Callable[..., None], *arguments: Any) -> None:
        """Call a function that works on sequences; an exception, logged if it is a bug, ends them by an error event."""
        try:
            work(*arguments)
        except Exception as error:
            if not isinstance(error, SoftmeetError):
                _log.exception("a step failed")
            for s in list(rows):
                self._fail(s, error)

    def _admit(self) -> list[Sequence] | None:
        """Wait for work; return the queued sequences that begin now, None if it is closed and every one has ended."""
        with self._wake:
            while not (self._waiting or self._running or self._closing):
                TURNS_AT_LOCK.beside(0, self)
                self._wake.wait()
            if self._closing and not (self._waiting or self._running):
                return None
            self._drop()
            new, tokens = list[Sequence](), 0
            while self._waiting and len(self._running) + len(new) < self.limits.rows:
                tokens += len(self._waiting[0].prompt)
                if new and tokens > _PROMPT_TOKENS_A_ROUND:
                    break
                new.append(self._waiting.popleft())
                new[-1].account = self._prompts
            if len(new) == 1 and not self._running:
                new[0].begin_anew()
            self._running += new
            return new

    def _drop(self) -> None:
        """End all sequences that were cancelled, are past their deadline, or are past the grace of :meth:`close`."""
        now = time.monotonic()
        for s in [*self._waiting, *self._running]:
            if s.cancelled or now > min(s.request.deadline, self._last_call):
                self._fail(s, ClosingError(_CLOSED) if now > self._last_call else TooLateError(_LATE))
        self._turns.drop()

    def _round(self, new: list[Sequence]) -> None:
        """Run one round: the newest tokens of all sequences that have one, and tasks for as long as that took.

        Averages are drawn at once, unless their reports are asked for, which take longer.
        """
        started, solving = time.perf_counter(), self._turns.kinds
        ready = [s for s in self._running if not s.busy and self._kinds.of(s) not in solving]
        # Nobody waits for members that wait for somebody else.
        for s in [s for s in ready if self._reproducible or s.waits]:
            s.busy = True
            self._turns.add(Task([s], partial(self._step_alone, s)))
        ready = [s for s in ready if not s.busy and not self._goes_alone(s)]
        found = self._step(ready)
        for s in [s for s in self._unsolved if self._kinds.of(s) not in solving]:
            found[s] = self._unsolved.pop(s)
        groups: dict[Any, list[Sequence]] = defaultdict(list)
        for s in found:
            s.busy = True
            groups[self._kinds.of(s)].append(s)
        for kind, rows in groups.items():
            self._start(Task(rows, partial(self._solve, {s: found[s] for s in rows}), kind))
        for prompts in prompts_together(new, alone=self._reproducible):
            self._turns.add(Task(prompts, partial(self._run_prompts, prompts)))
        self._turns.take(time.perf_counter() - started, self._some_wait, [s.account for s in found])

    def _step(self, ready: list[Sequence], pause: Callable[[], None] | None = None) -> dict[Sequence, Hidden]:
        """Read the newest tokens of sequences, each by those of its members that read every token."""
        return self.members.read_on(ready, {s: s.batched for s in ready}, pause=pause) if ready else {}

    def _start(self, task: Task) -> None:
        """Draw averages at once; all else takes turns."""
        first = task.rows[0]
        if first.combination.is_quick and first.request.report is None and not self._reproducible:
            self._guarded(task.rows, task.run, float("inf"))
        else:
            self._turns.add(task)

    def _goes_alone(self, s: Sequence) -> bool:
        """Return whether a sequence that has a newest token goes on by itself, or fails, and begin its turn if so."""
        if len(self._running) > 1:
            if s.alone:
                self._guarded([s], s.alone.end)
            return s.done
        if s.alone is None:
            s.alone = self._alone(s) or False
        if not s.alone:
            return False
        s.busy = True
        self._start(Task([s], partial(self._turn_alone, s)))
        return True

    def _turn_alone(self, s: Sequence, task: Task) -> None:
        """Let a sequence take one turn by itself, in which it may get no token, or several."""
        s.alone.go_on(task)
        s.busy = False

    def _step_alone(self, s: Sequence, task: Task) -> None:
        """Run one sequence's newest token and draw the next, as no other sequence's is."""
        self._solve(self._step([s], task.pause if s.waits else None), task)

    def _some_wait(self) -> bool:
        """Return whether a sequence waits for the next round."""
        solving = self._turns.kinds
        return any(not s.busy and self._kinds.of(s) not in solving for s in self._running)

    def _run_prompts(self, group: list[Sequence], task: Task) -> None:
        """Run the prompts of sequences of one combination, together or, if that fails, each alone."""
        group = [s for s in group if not s.done]
        try:
            found = read(self.members, group, task)
        except StoppedError:
            return  # nobody waits for them any more
        except SoftmeetError:
            if len(group) == 1:
                raise
            for s in (s for s in group if not s.done):
                self._guarded([s], self._run_prompts, [s], task)
            return
        for s in (s for s in group if not s.done):
            self._guarded([s], self._begin, s, found[s], task)

    def _begin(self, s: Sequence, hidden: Hidden, task: Task) -> None:
        """Score a prompt that was run if its request asks so, and have its first token drawn in the next round."""
        s.check()
        # Of a chat over bytes the members read tokens of their own, and the ensemble a beginning alone.
        own = len(s.own[0] or ()) if s.own else 0
        self.metrics.prompt_tokens.inc(own + len(s.prompt) - (own > 0))
        self.metrics.reused_tokens.inc(s.reused)
        if s.request.score_prompt:
            every = self._gates.ask({s: hidden}, task, every=True)[s]
            s.check()
            seconds = self.limits.token_seconds * len(every[0][:-1])
            self._emit(s, PromptScored(scored(s, [own[:-1] for own in every], task, seconds)))
        s.account = self._newcomers if s.account is self._prompts else s.account
        if s.max_tokens:
            self._unsolved[s] = [states[-1:] for states in hidden]
        else:
            self._finish(s, Finished("length"))

    def _solve(self, found: dict[Sequence, Hidden], task: Task) -> None:
        """Solve sequences of one combination together, draw the next token of each, and hand it over by :meth:`_give`.

        If solving them together fails, each is solved alone, so that only a sequence which fails alone is ended.

        Args:
            found: what the members predict that read every token of the sequences.
            task: the task that does so.
        """
        told = {s: own for s, own in self._gates.ask(found, task).items() if self._goes_on(s)}
        if told:
            self._draw(list(told), list(told.values()), task)

    def _draw(self, group: list[Sequence], hidden: list[Hidden], task: Task) -> None:
        """Do as :meth:`_solve`, with what every member predicts for each sequence."""
        suspended, started = task.suspended, task.clock()
        try:
            with task.limit(self.limits.token_seconds * len(group)):
                plain = not self._reproducible and all(s.request.report is None for s in group)
                chunks = list(combined(group, hidden, group[0].combination.settings, quickly=plain))
        except SoftmeetError as error:
            if len(group) == 1:
                self._fail(group[0], error)
            else:
                for s, own in zip(group, hidden, strict=True):
                    self._draw([s], [own], task)
            return
        self._kinds.learn(group[0], (task.clock() - started) / len(group))
        rest = iter(group)
        for chunk in chunks:
            part = list(islice(rest, len(chunk.ours)))
            saved = self._gates.saved(part, chunk.solution, (task.suspended - suspended) / len(chunks))
            for s, found in zip(part, tokens_of(part, chunk, drawn(part, chunk.ours), saved), strict=True):
                # A row within its tolerance may still have been polished, had there been time.
                late = self._reproducible and task.expired
                self._give(s, replace(found, status=Status.BUDGET.name) if late else found)
                task.pause()

    def _give(self, s: Sequence, token: Token) -> None:
        """Append a drawn token to its sequence and emit it; end the sequence at an end-of-text token or at its limit.

        Nothing happens if the sequence has ended while its token was being solved.
        """
        if s.dead_end is not None:
            self._fail(s, s.dead_end)
        if s.done:
            return
        now, before = time.perf_counter(), s.last
        if before is None:
            s.account = s.request.account
        else:
            self.metrics.between.observe(now - before)
        s.busy, s.last = False, now
        self.metrics.tokens.inc()
        if token.status in _UNSOLVED:
            self.metrics.unsolved.labels(token.status).inc()
        self._emit(s, *s.add(token))
        if token.token in s.request.ends:
            self._finish(s, Finished("stop"))
        elif s.answer.is_over:
            self._finish(s, Finished("length"))

    def _goes_on(self, s: Sequence) -> bool:
        """Return whether a sequence can go on; end it where a context is full, or by the error of a member."""
        if s.error is not None:
            self._fail(s, s.error)
        elif s.is_full:
            self._finish(s, Finished("length"))
        return not s.done

    def _fail(self, s: Sequence, error: Exception) -> None:
        """End a sequence by an error event, with what clients may know of the error."""
        self._finish(s, Failed(for_clients(error)))

    def _finish(self, s: Sequence, event: Finished | Failed) -> None:
        """End a sequence, unless it has ended: free its keys and values, and emit its last event."""
        if s.done:
            return
        s.done = True
        for place in (self._running, self._waiting):
            if s in place:
                place.remove(s)
        self._unsolved.pop(s, None)
        s.forget()
        self._emit(s, *s.rest(event), event)

    def _emit(self, s: Sequence, *events: Event) -> None:
        """Pass events to the sequence's listener; cancel the sequence if the listener fails."""
        try:
            for event in events:
                s.emit(event)
        except Exception as error:
            # A listener's event loop ends, with a RuntimeError, when the server does.
            if not isinstance(error, RuntimeError):
                _log.exception("a listener failed")
            s.cancel()


def read(members: Members, group: Several[Sequence], task: Task) -> dict[Sequence, Hidden]:
    """Return what members predict behind the prompts of sequences of one combination, and of all of a scored prompt.

    Args:
        members: those of all ensembles.
        group: the sequences, at least one.
        task: is paused where the reading may be left for a while.

    Raises:
        SoftmeetError: if a prompt cannot be read.
        StoppedError: if all sequences are cancelled meanwhile.
    """
    told = time.monotonic()

    def hear(done: int, total: int) -> None:
        nonlocal told
        if done < total and (now := time.monotonic()) > told + _EVERY:
            told = now
            _access_log.info(
                "reading %s of %s tokens of %d prompts, by all members", f"{done:,}", f"{total:,}", len(group)
            )

    own = Control(hear)
    for s in group:
        s.reading = group, own
    if all(s.cancelled for s in group):  # before they could know of the control
        own.stop()
    with own.over():
        return members.read_on(group, group[0].batched, every=group[0].request.score_prompt, pause=task.pause)
