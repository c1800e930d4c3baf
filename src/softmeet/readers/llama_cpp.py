"""A GGUF file as a reader of its own tokens, run by llama.cpp at the speed of that."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from softmeet.errors import InvalidInputError, SoftmeetError
from softmeet.heads import SoftmaxHead
from softmeet.members.gguf_head import gguf_head, require_its_logits
from softmeet.members.gguf_tokenizer import folder_of, known_file
from softmeet.readers.llama_context import MOST_ROWS, MOST_TOLD, LlamaContext, NoRoomError, RowTokens, longest_text
from softmeet.readers.llama_costs import loaded
from softmeet.readers.open_rows import ReaderOfTokens
from softmeet.readers.prefixes import PrefixCache, weakly
from softmeet.readers.reader import Given, Predictions, Read, Row, Traits, Work
from softmeet.readers.token_alphabet import TokenAlphabet
from softmeet.suspended import Done


@dataclass(eq=False)
class LlamaRow(Row):
    """A row of a context.

    Attributes:
        number: the row's number there.
        own: how many of the tokens are the member's own, before the text.
        tokens: these and the symbols that were read.
        ran: how many of them the context holds; the others are run before anything else is.
        unsure: whether the context may hold more of it, as a call was left before its end.
        last: (1, v), logits behind the last token, of a model that cannot take it back.
    """

    number: int = 0
    own: int = 0
    tokens: tuple[int, ...] = ()
    ran: int = 0
    unsure: bool = False
    last: Float[np.ndarray, "1 v"] | None = None
    known: int = 0
    is_new: bool = True

    @property
    def length(self) -> int:  # type: ignore[override]
        """The number of the text's symbols that were read."""
        return len(self.tokens) - self.own


@dataclass(eq=False)
class Job:
    """What has to be run for one read.

    Attributes:
        row, read: whose, and what.
        number: the number of the row in which it is run.
        start: how many of its tokens the context holds when these are run.
        tokens: those that are to be run.
        told: behind which of them predictions are wanted, counted from 0.
        found: what was predicted.
        done: how many of them were run.
        error: why it failed.
    """

    row: LlamaRow
    read: Read
    number: int
    start: int
    tokens: tuple[int, ...]
    told: list[int]
    found: list[Float[np.ndarray, "t v"]]
    done: int = 0
    error: SoftmeetError | None = None

    @property
    def left(self) -> bool:
        """Whether something is left to be run."""
        return self.done < len(self.tokens)

    def piece(self, room: int, places: int) -> RowTokens:
        """Return the next of what is left: so many tokens at most, and so many predictions."""
        told = [k for k in self.told if self.done <= k < self.done + room]
        end = min(len(self.tokens), self.done + room)
        if len(told) > places:
            end, told = told[places], told[:places]
        return RowTokens(
            self.number, self.start + self.done, self.tokens[self.done : end], [k - self.done for k in told]
        )

    def predictions(self) -> Float[np.ndarray, "t v"]:
        """Return what was predicted at the places that were asked for."""
        found = self.found[0] if len(self.found) == 1 else np.concatenate(self.found)
        return found[: len(self.read.at)]


# The most tokens of earlier texts that are kept for texts that begin alike, in so many rows at most.
_KEPT, _KEPT_ROWS = 2048, 8
# The largest mean KL, in nats, between predictions of a quantised file's text alone and with others: 0.022 was seen.
_COARSE = 0.05
# Of four files on a processor, calls of two rows took 1.7 to 2.3 times as long as those of one, of four 2.7 to 3.1.
_ROW_COST = 0.8
# Tokens on which a head is tried.
_TRIED = (1, 2, 3, 4, 5)


class LlamaReader(ReaderOfTokens[LlamaRow]):
    """A GGUF file that llama.cpp runs as it is.

    Args:
        path: the file.
        name: its name in messages; None for the file's.
        own: the tokens before every text for which no others are given; None for those that its tokenizer puts there.
        context: the most tokens of a text; None for those of the texts that it was trained on.
        gpu_layers: how many layers llama.cpp puts on a GPU, where its library has one.
        repack: whether weights are copied into the layout that llama.cpp has for this processor; None for the layout
            that is faster here, which is measured once.

    Raises:
        CheckpointError: if the file cannot be read, or llama.cpp is not installed or cannot load it.
    """

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        own: Sequence[int] | None = None,
        context: int | None = None,
        gpu_layers: int = 0,
        repack: bool | None = None,
    ) -> None:
        super().__init__(LlamaRow)
        self._made_of, self._stored = (path, name, own, context, gpu_layers, repack), 0
        self.name = name or Path(path).name
        self.file, tokenizer = known_file(Path(path), self.name)
        self.assets = folder_of(tokenizer)
        self._model, costs = loaded(self.file, self.name, gpu_layers, repack)
        self._context = longest_text(self.file, self.name, context)
        self.own = tuple(tokenizer.encode("") if own is None else own)
        self.limit = self._context - len(self.own)
        self.alphabet = TokenAlphabet(tokenizer, self._model.v, self._model.ends(tokenizer.added_tokens_decoder))
        self.traits = Traits(
            can_crop=self._model.can_crop, rounding="coarse" if self.file.is_quantised else "fine",
            bound=_COARSE if self.file.is_quantised else 1e-3, rows=MOST_ROWS, places=("cpu",), cost=self._model.bytes,
            row_cost=_ROW_COST, calls=costs.calls,
        )  # fmt: skip
        self._cells, self.parameters = LlamaContext(self._model, self._context), self._model.parameters
        self._free = list(range(self._cells.rows))
        self._prefixes = PrefixCache[tuple[int, ...]](_KEPT, weakly(self._forget))
        self._kept = dict[tuple[int, ...], int]()

    @property
    def bytes(self) -> int:
        """The bytes of the keys and values of open rows and of texts that are kept; what is shared counts for each."""
        held = sum(len(row.tokens) for row in self._rows) + self._prefixes.tokens
        return held * self.file.bytes_a_token

    @property
    def kept_tokens(self) -> int:
        """The number of tokens of earlier texts whose keys and values are kept."""
        return self._prefixes.tokens

    def open_head(self) -> SoftmaxHead:
        """Read the output layer, in single precision, and tell hidden states from now on.

        Hidden states are those that llama.cpp multiplies by the layer, rounded as it rounds them.

        Raises:
            UnsupportedHeadError: if the layer does not make the logits that llama.cpp tells, on a few tokens.
        """
        if self.head is None:
            if self._rows:
                what = f"expected no open rows of {self.name} while its output layer is opened"
                raise InvalidInputError(f"{what}: load the ensemble whose rule reads it first")
            head, kind = gguf_head(self.file, self.name)
            self._tell_hidden(head, kind)
            try:
                tried = _TRIED[: max(1, self._context - 1)]
                found = self.read_whole([tried], [range(1, len(tried) + 1)], _TRIED[:1])
                require_its_logits(head, found.hidden(), found.logits(), self.name)
            except BaseException:
                self.head = None
                self._cells.tell_hidden(0, 0)
                raise
        return self.head  # type: ignore[return-value]

    def _tell_hidden(self, head: SoftmaxHead, kind: int) -> None:
        self._cells.tell_hidden(head.d, kind)
        self.head, self._stored = head, kind

    def __reduce__(self) -> Any:
        """Have a copy in another process read the file there, in rows of its own."""
        return _again, (self._made_of, self.head, self._stored)

    def _forget(self, tokens: tuple[int, ...]) -> None:
        number = self._kept.pop(tokens)
        self._cells.cut(number, 0)
        self._free.append(number)

    def _number(self) -> int:
        """Return the number of a row that nobody has."""
        if not self._free and self._cells.rows < MOST_ROWS:
            before = self._cells.rows
            self._cells.grow(min(MOST_ROWS, 4 * before), self._cells.cells)
            self._free += range(before, self._cells.rows)
        elif not self._free:
            self._prefixes.clear()
        if not self._free:
            raise NoRoomError(f"expected at most {MOST_ROWS} rows of {self.name} in use at once: close one first")
        return self._free.pop()

    def open(self, text: Sequence[int] = (), own: Sequence[int] = (), *, reuse: bool = True) -> Row:
        """Open a row, as of :meth:`Reader.open`."""
        before = tuple(own) or self.own
        self._require_own(before)
        row = self._opened(LlamaRow(number=self._number(), own=len(before), tokens=before))
        every = [*before, *text]
        found, kept = self._prefixes.longest(every) if reuse and every else (0, None)
        if kept is not None:
            self._cells.copy(self._kept[kept], row.number, found)
            row.tokens, row.ran = tuple(every[: max(found, len(before))]), found
            row.known = row.length
        return row

    def _copied(self, row: LlamaRow) -> LlamaRow:
        """Return a row that shares what was read of another."""
        fork = replace(row, number=self._number())
        try:
            self._cells.copy(row.number, fork.number, row.ran)
        except BaseException:
            self._free.append(fork.number)
            raise
        return fork

    def _forget_behind(self, row: LlamaRow, count: int) -> None:
        """Have the context hold the first ``count`` tokens of a row at most."""
        row.ran = min(row.ran, count)
        self._cells.cut(row.number, count)

    def crop(self, row: Row, length: int) -> None:
        """Take back the symbols behind the first ``length``."""
        one = self._mine(row)
        if not self.traits.can_crop:
            raise self.cannot("take back what it has read")
        self._require_length(one, length)
        if length < one.length:
            one.tokens, one.last = one.tokens[: one.own + length], None
            self._forget_behind(one, len(one.tokens))

    def to_itself(self) -> AbstractContextManager[Any]:
        """Return a context in which texts are read as by a reader that has read nothing, if no row is open."""
        if not self._rows:
            self._prefixes.clear()
            self._cells.begin_anew()
            self._free = list(range(self._cells.rows))
        return nullcontext()

    def close(self, row: Row) -> None:
        """Close a row, and free what no other row or kept text shares."""
        one = self._mine(row)
        self._rows.pop(one)
        self._cells.cut(one.number, 0)
        self._free.append(one.number)

    def read(self, asked: Sequence[Read]) -> Generator[Done, None, Predictions]:
        """Read on in some rows, as of :meth:`Reader.read`."""
        rows = self._each_once(asked)
        every = zip(rows, asked, strict=True)
        refused = [self._refused(one, len(row.tokens), one.symbols) for row, one in every]
        errors = {k: error for k, error in enumerate(refused) if error}
        jobs, calls = dict[int, Job](), 0
        try:
            for k, one in enumerate(asked):
                try:
                    jobs |= {} if k in errors else {k: self._job(rows[k], one)}
                except NoRoomError as error:
                    errors[k] = error
            while left := [job for job in jobs.values() if job.left and job.error is None]:
                if calls or sum(len(job.tokens) - job.done for job in left) > self._model.at_once(1):
                    yield sum(job.done for job in jobs.values()), sum(len(job.tokens) for job in jobs.values())
                self._run(left)
                calls += 1
        except BaseException:
            for job in jobs.values():
                self._undo(job)
            raise
        errors |= {k: job.error for k, job in jobs.items() if job.error is not None}
        for job in jobs.values():
            self._settle(job)
        counts = [0 if k in errors else len(one.at) for k, one in enumerate(asked)]
        parts = [jobs[k].predictions() for k, count in enumerate(counts) if count]
        v = self._model.v
        told = torch.from_numpy(
            np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty((0, v), np.float32)
        )
        work = Work(calls, sum(len(job.tokens) for job in jobs.values()))
        hidden = None if self.head is None else told[:, v:]
        return Given(told[:, :v], counts, dict(sorted(errors.items())), work, hidden=hidden)

    def _job(self, row: LlamaRow, one: Read) -> Job:
        """Return what has to be run for one read."""
        if row.unsure:
            self._forget_behind(row, row.ran if self.traits.can_crop else 0)
        start = row.ran
        if one.at and not one.at[0] and start == len(row.tokens) and row.last is None:
            start -= 1  # the last token says what follows it
        tokens = (*row.tokens[start:], *one.symbols)
        first = len(tokens) - len(one.symbols) - 1
        told = [first + place for place in one.at if first + place >= 0]
        held = [row.last] if row.last is not None and len(told) < len(one.at) else []
        if not self.traits.can_crop and tokens and len(tokens) - 1 not in told:
            told.append(len(tokens) - 1)
        job = Job(row, one, row.number, start, tokens, told, held)
        if not one.keep and not self.traits.can_crop:
            job.number = self._number()
            self._cells.copy(row.number, job.number, start)
        return job

    def _run(self, jobs: Sequence[Job]) -> None:
        """Run some of the tokens that are left of jobs, in one call of the model."""
        for job in jobs:
            if job.row not in self._rows:
                job.error = InvalidInputError(f"a row of {self.name} was closed while it was read")
        room = self._model.at_once(sum(len(job.tokens) - job.done for job in jobs))
        pieces, places = list[tuple[Job, RowTokens]](), max(MOST_TOLD, self._cells.rows)
        for job in jobs:
            if room and job.error is None and (piece := job.piece(room, places)).tokens:
                if job.number == job.row.number and not job.done and job.start < job.row.ran:
                    self._forget_behind(job.row, job.start)
                job.row.unsure = True
                pieces.append((job, piece))
                room, places = room - len(piece.tokens), places - len(piece.told)
        if pieces:
            self._run_pieces(pieces)

    def _run_pieces(self, pieces: Sequence[tuple[Job, RowTokens]]) -> None:
        try:
            found = self._told(pieces)
        except NoRoomError as error:
            if len(pieces) == 1:
                pieces[0][0].error = error
            for one in pieces if len(pieces) > 1 else ():
                self._run_pieces([one])
            return
        at = 0
        for job, piece in pieces:
            job.found.append(found[at : at + len(piece.told)])
            job.done += len(piece.tokens)
            at += len(piece.told)

    def _told(self, pieces: Sequence[tuple[Job, RowTokens]]) -> Float[np.ndarray, "k v"]:
        """Run pieces; where there is no room, forget earlier texts, and then make room.

        Raises:
            NoRoomError: if there is not enough memory.
        """
        every = [piece for _, piece in pieces]
        while True:
            try:
                return self._cells.run(every)
            except NoRoomError:
                if self._prefixes.tokens:
                    self._prefixes.clear()
                else:
                    self._cells.grow(self._cells.rows, 2 * self._cells.cells)

    def _undo(self, job: Job) -> None:
        """Have a row be as it was before a job that did not end."""
        if job.number != job.row.number:
            self._cells.cut(job.number, 0)
            self._free.append(job.number)
        elif job.row in self._rows and job.done:
            # A recurrent state cannot be taken back in part.
            job.row.ran = min(job.start + job.done, len(job.row.tokens)) if self.traits.can_crop else 0
            self._cells.cut(job.number, job.row.ran)

    def _settle(self, job: Job) -> None:
        """Note what was read of a row."""
        row, one = job.row, job.read
        if job.error is not None or row not in self._rows:
            self._undo(job)
            return
        if one.keep:
            row.tokens = (*row.tokens, *one.symbols)
            row.ran = len(row.tokens) if job.tokens else row.ran
            row.unsure = False
        else:
            self._undo(job)
        if job.tokens and one.keep and not self.traits.can_crop:
            row.last = job.found[-1][-1:].copy()
        if row.is_new and one.keep:
            row.is_new = False
            self._keep(row)

    def _keep(self, row: LlamaRow) -> None:
        """Keep what was first read of a row, for texts that begin alike."""
        wanted = self.traits.can_crop and row.tokens and self._prefixes.wants(row.tokens)
        if wanted and len(self._kept) >= _KEPT_ROWS:
            self._prefixes.drop_oldest()
        if wanted and self._free:
            number = self._kept[row.tokens] = self._free.pop()
            self._cells.copy(row.number, number, len(row.tokens))
            self._prefixes.keep(row.tokens, row.tokens)


def gguf_reader(path: str | Path, name: str | None = None, **options: Any) -> LlamaReader:
    """Return a :class:`LlamaReader` whose texts begin with the tokens that they are given, as ensembles give them."""
    return LlamaReader(path, name, own=(), **options)


def _again(made_of: tuple[Any, ...], head: SoftmaxHead | None, kind: int) -> LlamaReader:
    """Make a reader of the same file, which tells hidden states if there is a head."""
    found = LlamaReader(*made_of)
    if head is not None:
        found._tell_hidden(head, kind)
    return found
