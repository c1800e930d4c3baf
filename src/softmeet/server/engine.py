"""The engine: one thread that owns the members, and a batch that sequences join and leave at any token."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.errors import NonFiniteError, SoftmeetError
from softmeet.hf.combining import Deferral
from softmeet.hf.report import token_report
from softmeet.rules.solution import Solution
from softmeet.server.batch import MemberBatch
from softmeet.server.errors import BusyError, ClosingError, InternalError, TooLateError
from softmeet.server.gating import Gates, Hidden, asked_of
from softmeet.server.metrics import Metrics
from softmeet.server.row import Row
from softmeet.server.sampling import next_tokens
from softmeet.server.work import Combination, Failed, Finished, PromptScored, Sequence, Token

log = logging.getLogger("softmeet.server")
# Prompt tokens that one step runs before the rows that are under way get their next token.
_PROMPT_TOKENS_A_STEP = 1024

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Limits:
    """What the engine takes on at once: rows in the batch, sequences waiting, prompt tokens kept for reuse."""

    rows: int = 64
    waiting: int = 256
    kept_tokens: int = 16384


class Engine:
    """Runs sequences of any number of ensembles; each member runs once a step for all rows that it is part of.

    Args:
        names: of members, for messages.
        limits: see :class:`Limits`.
        parallel: run the members of a step in threads of their own; for members on devices of their own.
        metrics: where to count.
    """

    def __init__(
        self,
        names: dict[PreTrainedModel, str],
        limits: Limits = Limits(),
        *,
        parallel: bool = False,
        metrics: Metrics | None = None,
    ) -> None:
        self.limits, self.metrics = limits, metrics or Metrics()
        self._batches = {model: MemberBatch(name, model, limits.kept_tokens) for model, name in names.items()}
        self._pool = ThreadPoolExecutor(len(names)) if parallel else None
        self._gates = Gates(self._batches, self._map, self.metrics)
        self._waiting: deque[Sequence] = deque()
        self._rows: dict[int, Row] = {}
        self._wake = threading.Condition()
        self._closing, self._last_call = False, float("inf")
        self._thread = threading.Thread(target=self._run, name="softmeet-engine", daemon=True)

    def start(self) -> None:
        """Start the thread that serves requests; before, they only queue up."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it is at work and takes more."""
        return self._thread.is_alive() and not self._closing

    @property
    def has_room(self) -> bool:
        """Whether one more sequence would be taken now."""
        return self.alive and self._free() > 0

    def _free(self) -> int:
        return self.limits.rows - len(self._rows) + self.limits.waiting - len(self._waiting)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Line up for the batch, all or none.

        Raises:
            BusyError: too many are waiting.
            ClosingError: the engine is shutting down.
        """
        found = list(sequences)
        with self._wake:
            if self._closing:
                raise ClosingError("the server is shutting down: ask another one, or again later")
            if len(found) > (free := self._free()):
                raise BusyError(
                    f"expected room for {len(found)} more in a queue of {self.limits.waiting}, found {free}: ask again "
                    "later"
                )
            self._waiting += found
            self._wake.notify()

    def close(self, grace: float) -> None:
        """Take nothing more; end what is not done within ``grace`` seconds, by name. Returns at once."""
        with self._wake:
            self._closing, self._last_call = True, time.monotonic() + grace
            self._wake.notify()

    def join(self) -> None:
        """Wait until the engine that was closed has ended."""
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while (new := self._admitted()) is not None:
                started = time.perf_counter()
                try:
                    self._step(new)
                except Exception as error:
                    # A bug must not leave every client waiting for ever.
                    log.exception("a step failed")
                    for row in [*self._rows.values(), *new]:
                        self._fail(row, error)
                self.metrics.steps.observe(time.perf_counter() - started)

    def _admitted(self) -> list[Row] | None:
        """The sequences that join now, as rows; waits while there is nothing to do; None at the end."""
        with self._wake:
            while not (self._waiting or self._rows or self._closing):
                self._wake.wait()
            if self._closing and not (self._waiting or self._rows):
                return None
            self._drop()
            new: list[Row] = []
            tokens = 0
            while self._waiting and len(self._rows) + len(new) < self.limits.rows:
                tokens += len(self._waiting[0].prompt)
                if new and tokens > _PROMPT_TOKENS_A_STEP:
                    break
                new.append(Row(self._waiting.popleft()))
            self.metrics.waiting.set(len(self._waiting))
            self.metrics.rows.set(len(self._rows) + len(new))
            return new

    def _drop(self) -> None:
        """Take out what was given up or is out of time, wherever it is."""
        now = time.monotonic()
        for sequence in [s for s in self._waiting if s.cancelled or now > min(s.work.deadline, self._last_call)]:
            self._waiting.remove(sequence)
            self._emit(sequence, Failed(self._reason(sequence)))
        for row in list(self._rows.values()):
            s = row.sequence
            if s.cancelled or now > min(s.work.deadline, self._last_call):
                self._fail(row, self._reason(s))

    def _reason(self, sequence: Sequence) -> SoftmeetError:
        if time.monotonic() > self._last_call:
            return ClosingError("the server is shutting down and ended this answer before its end: ask another one")
        return TooLateError("the answer was not done in time: ask for fewer tokens, or raise the server's --timeout")

    def _step(self, new: list[Row]) -> None:
        hidden: dict[Row, Hidden] = {}
        self._each_row(new, self._prefill, hidden)
        outputs: dict[tuple[PreTrainedModel, int], Float[Tensor, "1 d"]] = {}
        busy = [batch for batch in self._batches.values() if batch.rows]
        for batch, out in zip(busy, self._map(self._forward, busy), strict=True):
            outputs |= {(batch.model, name): out[k : k + 1] for k, name in enumerate(batch.rows)}
        running = list(self._rows.values())
        self._each_row(running, lambda row: self._finite(row, [outputs[m, id(row)] for m in row.batched]), hidden)
        every = self._gates.ask({row: own[0] for row, own in hidden.items() if row.trails})
        self._each_row(list(every), lambda row: self._finite(row, every[row]), hidden)
        groups: dict[Combination, list[Row]] = defaultdict(list)
        for row in hidden:
            groups[row.sequence.work.combination].append(row)
        for combination, rows in groups.items():
            self._advance(combination, rows, hidden)

    def _each_row(self, rows: list[Row], function: Callable[[Row], Hidden], found: dict[Row, Hidden]) -> None:
        """Put what ``function`` gives for each row into ``found``; a row that fails by its own fault fails alone."""
        for row in rows:
            try:
                found[row] = function(row)
            except SoftmeetError as error:
                found.pop(row, None)
                self._fail(row, error)

    def _map(self, function: Callable[[T], U], items: list[T]) -> list[U]:
        return list((self._pool.map if self._pool else map)(function, items))

    def _forward(self, batch: MemberBatch) -> Float[Tensor, "B d"]:
        return batch.step([self._rows[name].tokens[-1] for name in batch.rows])

    def _prefill(self, row: Row) -> Hidden:
        s = row.sequence
        runs = self._map(lambda m: self._batches[m].prefill(s.prompt, every=s.work.score_prompt), row.batched)
        hidden = self._finite(row, [found for found, _, _ in runs])
        row.states = [states for _, states, _ in runs]
        self.metrics.prompt_tokens.inc(len(s.prompt))
        self.metrics.reused_tokens.inc(min(reused for _, _, reused in runs))
        if s.work.score_prompt:
            every, asked = self._gates.over_prompt(row, hidden[0]) if row.trails else (hidden, None)
            kept = slice(0, -1)
            self._score(row, [own[kept] for own in self._finite(row, every)], asked and asked.take(kept))
        return [states[-1:] for states in hidden]

    def _score(self, row: Row, hidden: Hidden, asked: Deferral | None) -> None:
        s, tokens = row.sequence, iter(row.sequence.prompt[1:])
        found: list[Token] = []
        if len(hidden[0]):
            how = s.work.combination
            for log_probs, solution in how.model.combiner.solve_in_chunks(hidden, how.settings, asked, proved=False):
                found += [_token(s, solution, log_probs, k, next(tokens)) for k in range(log_probs.shape[1])]
        self._emit(s, PromptScored(found))

    def _advance(self, combination: Combination, rows: list[Row], hidden: dict[Row, Hidden]) -> None:
        """Give each row of a group its next token, solved together; one by one if a row's own data forbid that."""
        stacked = [torch.cat(member) for member in zip(*(hidden[row] for row in rows), strict=True)]
        try:
            chunks = list(
                combination.model.combiner.solve_in_chunks(stacked, combination.settings, asked_of(rows), proved=False)
            )
        except SoftmeetError as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
            else:
                for row in rows:
                    self._advance(combination, [row], hidden)
            return
        start = 0
        for log_probs, solution in chunks:
            part = rows[start : start + log_probs.shape[1]]
            start += len(part)
            self.metrics.passes.inc(solution.num_passes.sum().item())
            saved = self._gates.saved(part, solution)
            scores = [row.sampler.scores(row.tokens, solution.log_probs[k]) for k, row in enumerate(part)]
            drawn = next_tokens([row.sampler for row in part], torch.stack(scores))
            for k, (row, token) in enumerate(zip(part, drawn, strict=True)):
                self._give(row, _token(row.sequence, solution, log_probs, k, token, saved))

    def _give(self, row: Row, token: Token) -> None:
        s = row.sequence
        if row.drawn < s.max_tokens:
            row.tokens.append(token.token)
            self.metrics.tokens.inc()
            self._emit(s, token)
            if token.token in _ends(s.work.combination.model):
                self._finish(row, Finished("stop"))
                return
        if row.drawn >= s.max_tokens:
            self._finish(row, Finished("length"))
        elif not row.joined:
            self._join(row)

    def _join(self, row: Row) -> None:
        for model, states in zip(row.batched, row.states, strict=True):
            self._batches[model].join(id(row), states)
        row.states, row.joined = [], True
        self._rows[id(row)] = row

    def _finite(self, row: Row, hidden: Hidden) -> Hidden:
        bad = [self._batches[m].name for m, h in zip(row.members, hidden, strict=False) if not h.isfinite().all()]
        if bad:
            raise NonFiniteError(
                f"expected finite hidden states, got NaN or an infinity from {', '.join(bad)}: leave it out of this "
                "request, or change the prompt"
            )
        return hidden

    def _fail(self, row: Row, error: Exception) -> None:
        known = error if isinstance(error, SoftmeetError) else InternalError("the server failed: see its log")
        self._finish(row, Failed(known))

    def _finish(self, row: Row, event: Finished | Failed) -> None:
        if row.done:
            return
        row.done = True
        if row.joined:
            for model in row.batched:
                self._batches[model].leave(id(row))
            del self._rows[id(row)]
        self._emit(row.sequence, event)

    def _emit(self, sequence: Sequence, event: Token | PromptScored | Finished | Failed) -> None:
        try:
            sequence.emit(event)
        except RuntimeError:  # the listener's event loop has ended
            sequence.cancel()


def _ends(model: object) -> tuple[int, ...]:
    found = model.generation_config.eos_token_id  # type: ignore[attr-defined]
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _token(
    s: Sequence, solution: Solution, log_probs: Float[Tensor, "n B v"], row: int, token: int, saved: float = 0.0
) -> Token:
    """With what the sequence asked to know about it; ``saved`` are the seconds of a row whose gate was closed."""
    ours, gated = solution.log_probs[row], bool(solution.gated[row])
    saved = saved if gated else 0.0
    if s.work.top is None and s.work.report is None:
        return Token(token, gated=gated, saved=saved)
    best = ours.topk(min(s.work.top or 0, len(ours)))
    return Token(
        token,
        ours[token].item(),
        list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        None if s.work.report is None else token_report(solution, log_probs, row, token, s.work.report),
        gated=gated,
        saved=saved,
    )
