"""The members of a server: each is a reader, in which every sequence has a row.

Usually each member reads the newest tokens of all its sequences in one call. What it predicts for a sequence then
depends on the others up to rounding. If members are *reproducible*, every sequence is read by itself, at the price of
the batch: its numbers are the same, to the last bit, whoever else is served.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any, Literal

from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.members.partial_cache import layers_of_keys_and_values
from softmeet.readers.byte_reader import ByteReader
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.reader import Predictions, Read, Reader, finished
from softmeet.readers.transformers import TransformersReader
from softmeet.server.gating import Hidden
from softmeet.server.sequences import Runner, Sequence, members_of
from softmeet.server.together import Together

_NO_ROWS = "its rows cannot join a running batch; use softmeet generate"
# A sequence, and which of its members a reader is; an ensemble may have one several times, with prompts of its own.
Part = tuple[Sequence, int]


class Members:
    """The members of all ensembles of a server, each once, with a row for each running sequence.

    Args:
        readers: those of :func:`readers_of`, one for each member.
        parallel: whether members run at the same time, in a thread each; it pays if they are on different devices, and
            "auto" measures whether it does for the newest tokens of so many sequences.
        reproducible: whether every sequence is run by itself.
    """

    def __init__(self, readers: dict[Any, Reader], *, parallel: bool | Literal["auto"], reproducible: bool) -> None:
        self._readers, self._reproducible = readers, reproducible
        self._together = Together(len(readers), parallel)

    @property
    def cache_bytes(self) -> int:
        """The bytes of all keys and values of running sequences and of kept prompts."""
        return sum(reader.bytes for reader in self._readers.values())

    @property
    def kept_tokens(self) -> int:
        """The number of prompt tokens whose keys and values are kept for later prompts, summed over members."""
        return sum(getattr(reader, "kept_tokens", 0) for reader in self._readers.values())

    def reader(self, s: Sequence, i: int) -> Reader:
        """Return the reader that is member i of a sequence."""
        return self._readers[_key(s.members[i])]

    def step(self, ready: list[Sequence]) -> dict[Sequence, Hidden]:
        """Read the newest token of sequences by the members in each one's ``batched``.

        Args:
            ready: the sequences, whose members have read all tokens but the newest.

        Returns:
            for each sequence, what each of these members predicts behind its newest token, as :meth:`read_on` has it.
        """
        if self._reproducible:
            return {s: self.read_on([s], slice(len(s.batched)))[s] for s in ready}
        return self._read((s, slice(len(s.batched))) for s in ready)

    def read_on(
        self,
        sequences: list[Sequence],
        members: slice,
        *,
        every: bool = False,
        pause: Callable[[], None] = lambda: None,
    ) -> dict[Sequence, Hidden]:
        """Read the tokens and drafts of sequences that members have not read, each member those of all together.

        Args:
            sequences: why a member cannot read them is added to their ``failures``.
            members: the members that read, as a slice of each sequence's ``members``.
            every: whether the next token is to be predicted behind all t tokens that a member has not read, in place of
                the newest alone. What is kept of earlier prompts is then not used.
            pause: called between the pieces of a long prompt, if members do not run in threads of their own.

        Returns:
            for each sequence and each of those members the last hidden states, (t, d_i), or of a member without a head
            log-probabilities in nats, (t, v); (1, …) for the newest token alone.
        """
        if self._reproducible and len(sequences) > 1:
            return {s: self.read_on([s], members, every=every, pause=pause)[s] for s in sequences}
        return self._read(((s, members) for s in sequences), every=every, pause=pause)

    def _read(
        self,
        asked: Iterable[tuple[Sequence, slice]],
        *,
        every: bool = False,
        pause: Callable[[], None] | None = None,
    ) -> dict[Sequence, Hidden]:
        """Read as :meth:`read_on` does; without a ``pause`` in the way that was measured to be faster."""
        parts, found = defaultdict[Reader, list[Part]](list), dict[Sequence, Hidden]()
        for s, members in asked:
            found[s] = []
            for i in range(len(s.members))[members]:
                parts[self.reader(s, i)].append((s, i))
        # A task can be suspended in its own thread alone.
        between = pause if pause is not None and self._together.parallel is not True else lambda: None
        run = partial(self._read_by, parts, every=every, pause=between)
        if pause is None:
            told = self._together.measured(run, list(parts), len(found))
        else:
            told = self._together.map(run, list(parts))
        behind = dict[Part, Any]()
        for reader, own, predictions in zip(parts, parts.values(), told, strict=True):
            states = predictions.log_probs() if reader.head is None else predictions.hidden()
            behind |= zip(own, states.split(predictions.counts), strict=True)
            for k, error in predictions.errors.items():
                own[k][0].failures.append((reader.name, error))
        for (s, _), states in sorted(behind.items(), key=lambda one: one[0][1]):
            found[s].append(states)
        return found

    def _read_by(
        self, parts: dict[Reader, list[Part]], reader: Reader, *, every: bool, pause: Callable[[], None]
    ) -> Predictions:
        return finished(self._reading(reader, parts[reader], every=every), pause)

    def _reading(self, reader: Reader, parts: list[Part], *, every: bool) -> Generator[None, None, Predictions]:
        asked = []
        for s, i in parts:
            row, symbols = s.row(i, reader, reuse=not every), s.unread(i)
            # A token in whose place the member reads its own is predicted behind before any symbol.
            first = max(0, 1 - (0 if row.length else s.skipped[i])) if every else len(symbols)
            asked.append(Read(row, symbols, range(first, len(symbols) + 1)))
        return (yield from reader.read(asked))

    def crop(self, s: Sequence, i: int, length: int) -> None:
        """Have member i of a sequence take back all tokens behind the first ``length``."""
        reader = self.reader(s, i)
        row = s.row(i, reader)
        if row.length + s.skipped[i] > length:
            reader.crop(row, length - s.skipped[i])

    def close(self, s: Sequence) -> None:
        """Close the rows of a sequence."""
        for i, row in enumerate(s.rows):
            if row is not None:
                self.reader(s, i).close(row)

    @staticmethod
    def reused(s: Sequence) -> int:
        """Return how many tokens of a prompt none of its members had to read."""
        return min(0 if row is None else row.known for row in s.rows[: len(s.batched)])


def readers_of(
    models: Iterable[EnsembleForCausalLM], names: Iterable[Iterable[str]], kept_tokens: int = 0
) -> dict[Any, Reader]:
    """Make a reader of every member of ensembles, one of those that several ensembles share.

    Args:
        models: the ensembles, in evaluation mode.
        names: for each, its members' names in messages.
        kept_tokens: for each member, the most prompt tokens whose keys and values are kept for prompts that begin
            alike. Such a prompt is run in other pieces, and so rounded otherwise.

    Raises:
        InvalidInputError: if a member's cache holds anything but keys and values, as a recurrent model's does.
    """
    found = dict[Any, Reader]()
    for model, own in zip(models, names, strict=True):
        for member, head, name in zip(members_of(model), model.member_heads, own, strict=True):
            if _key(member) in found:
                continue
            if isinstance(member, ByteMember):
                found[_key(member)] = ByteReader(member, name)
                continue
            layers_of_keys_and_values(name, member.config, _NO_ROWS)
            found[_key(member)] = TransformersReader(member, model.tokenizer, name, (), kept_tokens, head)
    return found


def _key(member: Runner) -> Any:
    """Return what a member's reader is found by: over bytes its model and spelling, whatever it reads before texts."""
    return (member.model, member.spelling) if isinstance(member, ByteMember) else member
