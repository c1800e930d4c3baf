"""The batcher: the one thread that runs a server's members, in batches that sequences join and leave at any token.

The thread works in *steps*. A step runs the prompts of sequences that join, runs each member once on the newest token
of all sequences that it takes part in, combines the members' distributions, and draws one token for each sequence.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.errors import NonFiniteError, SoftmeetError
from softmeet.hf.combining import Deferral
from softmeet.hf.report import token_report
from softmeet.rules.problem import TokensBefore
from softmeet.rules.solution import Solution
from softmeet.server.batch import MemberBatch
from softmeet.server.errors import BusyError, ClosingError, InternalError, TooLateError
from softmeet.server.gating import Gates, Hidden, joined
from softmeet.server.metrics import Metrics
from softmeet.server.sampling import next_tokens
from softmeet.server.sequences import Combination, Event, Failed, Finished, PromptScored, Sequence, Token

_log = logging.getLogger("softmeet.server")
# The most prompt tokens of one step, though at least one prompt joins: running sequences wait for them meanwhile.
_PROMPT_TOKENS_A_STEP = 1024
_CLOSED = "the server is shutting down and ended this answer before its end: ask another one"
_LATE = "the answer was not done in time: ask for fewer tokens, or raise the server's --timeout"


@dataclass(frozen=True)
class Limits:
    """The limits on the work that a batcher accepts at once.

    Args:
        rows: the most sequences in the running batch, at least 1.
        waiting: the most sequences in the queue beside those for which the running batch has free rows, at least 0.
        kept_tokens: for each member, the most prompt tokens whose keys and values it keeps after use, so that a later
            prompt with the same beginning need not compute that beginning again.
    """

    rows: int = 64
    waiting: int = 256
    kept_tokens: int = 16384


class Batcher(threading.Thread):
    """The thread that owns a server's members and generates the tokens of all sequences, of any number of ensembles.

    In each step a member runs once for all sequences that it takes part in, whatever their ensembles; then the
    sequences with equal :class:`~softmeet.server.sequences.Combination` are solved together, and each gets one token.
    Sequences submitted before ``start()`` wait in the queue. To end the thread, call :meth:`close`, then ``join()``.

    Args:
        names: for each member, which is in evaluation mode, its name in messages; a member of several ensembles is
            named once. Only sequences of these members may be submitted.
        limits: how many sequences may run and wait.
        metrics: all of its counters but ``requests`` and ``first`` are kept up to date, on the batcher's thread.
        parallel: whether the members of a step run at the same time, in a thread each; it pays if they are on different
            devices.

    Raises:
        InvalidInputError: if a member's cache holds anything but keys and values, as a recurrent model's does.
    """

    def __init__(
        self, names: dict[PreTrainedModel, str], limits: Limits, metrics: Metrics, *, parallel: bool = False
    ) -> None:
        super().__init__(name="softmeet-batcher", daemon=True)
        self.limits, self.metrics = limits, metrics
        self._batches = {model: MemberBatch(name, model, limits.kept_tokens) for model, name in names.items()}
        self._map: Callable[..., Iterable[Any]] = ThreadPoolExecutor(len(names)).map if parallel else map
        self._gates = Gates(partial(self._catch_up, members=slice(1, None)), self.metrics)
        self._waiting: deque[Sequence] = deque()
        # Those whose prompts run in this step, and those in the running batch.
        self._joining: list[Sequence] = []
        self._running: list[Sequence] = []
        self.metrics.waiting.set_function(lambda: len(self._waiting))
        self.metrics.rows.set_function(self._rows)
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
        return self.limits.rows - self._rows() + self.limits.waiting - len(self._waiting)

    def _rows(self) -> int:
        """Return how many sequences are in the running batch, those that join it in this step included."""
        return len(self._joining) + len(self._running)

    def submit(self, sequences: list[Sequence]) -> None:
        """Append sequences to the queue: all of them, or none if there is no room for all.

        Args:
            sequences: new sequences, usually one request's; their events come by each sequence's ``emit``, which is
                called on the batcher's thread.

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
        """Run steps until :meth:`close` has been called and every sequence has ended.

        It is the thread's body: callers use ``start()``. If a step fails as a whole, the error is logged, all running
        sequences end with the event :class:`~softmeet.server.sequences.Failed`, and the next step follows.
        """
        with torch.inference_mode():
            while (new := self._admit()) is not None:
                started = time.perf_counter()
                try:
                    self._step(new)
                except Exception as error:
                    # Without this, a bug would leave every client waiting for ever.
                    _log.exception("a step failed")
                    for s in [*self._running, *new]:
                        self._fail(s, error)
                self.metrics.steps.observe(time.perf_counter() - started)

    def _admit(self) -> list[Sequence] | None:
        """Wait until there is work, and return the queued sequences that join in this step, perhaps none.

        Returns:
            the sequences, at least one if there is a free row; None if the batcher is closed and every sequence has
            ended.
        """
        with self._wake:
            while not (self._waiting or self._running or self._closing):
                self._wake.wait()
            if self._closing and not (self._waiting or self._running):
                return None
            self._drop()
            tokens = 0
            while self._waiting and self._rows() < self.limits.rows:
                tokens += len(self._waiting[0].prompt)
                if self._joining and tokens > _PROMPT_TOKENS_A_STEP:
                    break
                self._joining.append(self._waiting.popleft())
            return list(self._joining)

    def _drop(self) -> None:
        """End all sequences that were cancelled, are past their deadline, or are past the grace of :meth:`close`."""
        now = time.monotonic()
        for s in [*self._waiting, *self._running]:
            if s.cancelled or now > min(s.request.deadline, self._last_call):
                if not s.joined:
                    self._waiting.remove(s)
                self._fail(s, ClosingError(_CLOSED) if now > self._last_call else TooLateError(_LATE))

    def _step(self, new: list[Sequence]) -> None:
        """Run one step: the prompts of new sequences and the newest tokens of the running ones, then one draw for each.

        A sequence that fails is ended by an error of its own; the others are not affected.
        """
        hidden: dict[Sequence, Hidden] = {}
        for s in new:
            try:
                hidden[s] = self._run_prompt(s)
            except SoftmeetError as error:
                self._fail(s, error)
        outputs: dict[tuple[PreTrainedModel, Sequence], Float[Tensor, "1 d"]] = {}
        busy = [batch for batch in self._batches.values() if batch.rows]
        for batch, out in zip(busy, self._map(MemberBatch.step, busy), strict=True):
            outputs |= {(batch.model, s): out[k : k + 1] for k, s in enumerate(batch.rows)}
        hidden |= {s: [outputs[model, s] for model in s.batched] for s in self._running}
        hidden |= self._gates.ask({s: own[0] for s, own in hidden.items() if s.combination.unsure})
        groups: dict[Combination, list[Sequence]] = defaultdict(list)
        for s, own in hidden.items():
            try:
                self._check_finite(s, own)
                groups[s.combination].append(s)
            except SoftmeetError as error:
                self._fail(s, error)
        for group in groups.values():
            self._advance(group, hidden)

    def _catch_up(self, sequences: list[Sequence], *, members: slice, every: bool = False) -> dict[Sequence, Hidden]:
        """Run members on the tokens of sequences that they have not run yet, each member on all sequences together.

        Args:
            sequences: at least one token of each is new to each of the members.
            members: the members to run, as a slice of each sequence's ``members``.
            every: as of :meth:`MemberBatch.catch_up`.

        Returns:
            for each sequence, the last hidden states of each of those members at the t tokens that it ran, (t, d_i).
        """
        behind: dict[PreTrainedModel, list[tuple[Sequence, int]]] = defaultdict(list)
        for s in sequences:
            for i in range(len(s.members))[members]:
                behind[s.members[i]].append((s, i))
        hidden: dict[tuple[Sequence, int], Float[Tensor, "t _"]] = {}
        runs = self._map(lambda model: self._batches[model].catch_up(behind[model], every=every), behind)
        for entries, states in zip(behind.values(), runs, strict=True):
            hidden |= zip(entries, states, strict=True)
        return {s: [hidden[s, i] for i in range(len(s.members))[members]] for s in sequences}

    def _run_prompt(self, s: Sequence) -> Hidden:
        """Run a prompt alone, so that its hidden states depend on no other sequence; score it if its request asks so.

        Returns:
            the last hidden states at the prompt's last token, (1, d_i) for each member in ``s.batched``.
        """
        scored = s.request.score_prompt
        hidden = self._catch_up([s], members=slice(len(s.batched)), every=scored)[s]
        self._check_finite(s, hidden)
        self.metrics.prompt_tokens.inc(len(s.prompt))
        self.metrics.reused_tokens.inc(len(s.prompt) - max(map(len, hidden)))
        if scored:
            every, asked = self._gates.over_prompt(s, hidden)
            self._check_finite(s, every)
            self._score(s, [own[:-1] for own in every], asked and asked.take(slice(-1)))
        return [states[-1:] for states in hidden]

    def _score(self, s: Sequence, hidden: Hidden, asked: Deferral | None) -> None:
        """Emit the event :class:`PromptScored` for a prompt's tokens but the first.

        Args:
            s: the prompt's sequence.
            hidden: each member's last hidden states at all tokens of the prompt but the last, (t, d_i).
            asked: at which of these tokens all members ran; None for all of them.
        """
        how, tokens, found = s.combination, iter(s.prompt[1:]), []
        before = TokensBefore.of(torch.tensor(s.prompt[:-1]), how.model.tokenizer)
        chunks = how.model.combiner.solve_in_chunks(hidden, how.settings, asked, before, proved=False)
        for log_probs, solution in chunks:
            found += [_token(s, solution, log_probs, k, next(tokens)) for k in range(log_probs.shape[1])]
        self._emit(s, PromptScored(found))

    def _advance(self, group: list[Sequence], hidden: dict[Sequence, Hidden]) -> None:
        """Solve sequences of one combination together, draw the next token of each, and hand it over by :meth:`_give`.

        If solving them together fails, each is solved alone, so that only a sequence which fails alone is ended.

        Args:
            group: the sequences.
            hidden: for each sequence, the last hidden states of every member at its newest token, (1, d_i).
        """
        combination = group[0].combination
        stacked = [torch.cat(member) for member in zip(*(hidden[s] for s in group), strict=True)]
        try:
            before = TokensBefore.of(torch.tensor([s.tokens[-1] for s in group]), combination.model.tokenizer)
            solve = combination.model.combiner.solve_in_chunks
            chunks = list(solve(stacked, combination.settings, joined(group), before, proved=False))
        except SoftmeetError as error:
            if len(group) == 1:
                self._fail(group[0], error)
            else:
                for s in group:
                    self._advance([s], hidden)
            return
        rest = iter(group)
        for log_probs, solution in chunks:
            part = list(islice(rest, log_probs.shape[1]))
            self.metrics.passes.inc(solution.num_passes.sum().item())
            saved = self._gates.saved(part, solution)
            scores = [s.sampler.scores(s.tokens, solution.log_probs[k]) for k, s in enumerate(part)]
            drawn = next_tokens([s.sampler for s in part], torch.stack(scores))
            for k, (s, token) in enumerate(zip(part, drawn, strict=True)):
                self._give(s, _token(s, solution, log_probs, k, token, saved))

    def _give(self, s: Sequence, token: Token) -> None:
        """Append a drawn token to its sequence and emit it; end the sequence at an end-of-text token or at its limit.

        A sequence that does not end with its first token becomes a row of its members' batches then. If the limit is 0
        tokens the draw is dropped.
        """
        if s.drawn < s.max_tokens:
            s.tokens.append(token.token)
            self.metrics.tokens.inc()
            self._emit(s, token)
            if token.token in _ends(s.combination.model):
                self._finish(s, Finished("stop"))
                return
        if s.drawn >= s.max_tokens:
            self._finish(s, Finished("length"))
        elif not s.joined:
            for i, model in enumerate(s.batched):
                self._batches[model].join(s, i)
            s.joined = True
            self._joining.remove(s)
            self._running.append(s)

    def _check_finite(self, s: Sequence, hidden: Hidden) -> None:
        """Raise NonFiniteError with the names of the members at fault if any hidden state of a sequence is not finite.

        Args:
            s: the sequence.
            hidden: the last hidden states, (t, d_i), of its members, or of the first few of them.
        """
        bad = [self._batches[m].name for m, h in zip(s.members, hidden, strict=False) if not h.isfinite().all()]
        if bad:
            raise NonFiniteError(
                f"expected finite hidden states, got NaN or an infinity from {', '.join(bad)}: leave it out of this "
                "request, or change the prompt"
            )

    def _fail(self, s: Sequence, error: Exception) -> None:
        """End a sequence by an error event; anything but a SoftmeetError becomes an InternalError without details."""
        known = error if isinstance(error, SoftmeetError) else InternalError("the server failed: see its log")
        self._finish(s, Failed(known))

    def _finish(self, s: Sequence, event: Finished | Failed) -> None:
        """End a sequence, unless it has ended: take it out of the batches, free its cache, and emit its last event."""
        if s.done:
            return
        s.done = True
        if s.joined:
            for model in s.batched:
                self._batches[model].leave(s)
            self._running.remove(s)
        elif s in self._joining:
            self._joining.remove(s)
        s.trails = []  # frees keys and values even if the listener keeps a reference to the sequence
        self._emit(s, event)

    def _emit(self, s: Sequence, event: Event) -> None:
        """Pass an event to the sequence's listener; cancel the sequence if the listener's event loop has ended."""
        try:
            s.emit(event)
        except RuntimeError:  # the listener's event loop has ended
            s.cancel()


def _ends(model: Any) -> tuple[int, ...]:
    """Return the ids of an ensemble's end-of-text tokens."""
    found = model.generation_config.eos_token_id
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _token(
    s: Sequence, solution: Solution, log_probs: Float[Tensor, "n B v"], row: int, token: int, saved: float = 0.0
) -> Token:
    """Return a token with the log-probabilities, the listed tokens and the report that its sequence's request asks for.

    Args:
        s: the sequence.
        solution: of a solved batch of B rows.
        log_probs: the members' log-probabilities in the same rows, in nats.
        row: the sequence's row.
        token: the id that was drawn, or that stands in the prompt.
        saved: seconds that a closed gate saves in a row; ignored if the row's gate was open.
    """
    ours, gated = solution.log_probs[row], bool(solution.gated[row])
    top, report, saved = s.request.top, s.request.report, saved if gated else 0.0
    if top is None and report is None:
        return Token(token, gated=gated, saved=saved)
    best = ours.topk(min(top or 0, len(ours)))
    listed = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    found = None if report is None else token_report(solution, log_probs, row, token, report)
    return Token(token, ours[token].item(), listed, found, gated, saved)
