"""The readers of an ensemble's members: what of the ensemble's model has to do with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from softmeet.decoders.own_tokens import OwnTokens
from softmeet.engine.ask import Members
from softmeet.engine.combine import Combiner
from softmeet.engine.continuation import Own
from softmeet.heads import SoftmaxHead
from softmeet.members.reader_model import ReaderModel
from softmeet.members.spelling import Spelling, spelling_of
from softmeet.members.trunk import require_cache
from softmeet.members.vocabulary import token_support
from softmeet.readers.guarded import GuardedReader
from softmeet.readers.reader import Alphabet, Reader, Row
from softmeet.readers.recurrent import RecurrentReader
from softmeet.readers.transformers import TransformersReader, others_than_keys_and_values

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble


class Alone:
    """A member of an ensemble as one that reads texts in its own tokens; it shares the ensemble's model of it.

    What it predicts is normalised over the tokens that spell something or end a text.

    Args:
        model: the ensemble.
        i: the member's number.
        reader: the member's reader, over its own tokens.
        spelling: how these are spelled.

    Attributes:
        tokens: its tokens.
        reading: itself, as one that reads.
        members, combiner, tokenizer, garbage, claimants, readers_of_members: as of an ensemble of one.

    Raises:
        VocabularyMismatchError: if its output layer lacks a logit for one of its tokens.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    claimants: Sequence[Reader] = ()

    def __init__(self, model: AnyEnsemble, i: int, reader: Reader, spelling: Spelling) -> None:
        self._model, self._i = model, i
        ends = reader.alphabet.ends | (set() if spelling.end is None else {spelling.end})
        pairs = zip(spelling.words, spelling.tokens.tolist(), strict=True)
        self.tokens = OwnTokens.of(pairs, ends, spelling.cut_writable)
        names, heads = [model.config.members[i]], [model.member_heads[i]]
        known = frozenset([*self.tokens.ids.tolist(), *self.tokens.ends])
        self.combiner = Combiner(names, heads, token_support(known, names, heads))
        self.members, self.garbage = nn.ModuleList([model.members[i]]), model.garbage
        self.readers_of_members, self.reading = [reader], Members(1)

    def before_claims(self, prompt: Sequence[int], own: Own) -> tuple[Sequence[int], int]:
        """Return nothing: no reader claims a part of what a member says by itself."""
        return (), 0

    def before(self, i: int, prompt: Sequence[int], own: Own) -> tuple[Sequence[int], int]:
        """Return what the member reads of its own at the beginning of a text of the ensemble, as the ensemble says."""
        return self._model.before(self._i, prompt, own)


class ReadMembers:
    """The part of an ensemble's model that makes readers of its members.

    Attributes:
        garbage: rows of texts that nobody needs any more, each with its reader, to be closed before the next reading.
        claimants: readers that are no members, and claim a part of what the members' rule answers.
    """

    garbage: deque[tuple[Reader, Row]]
    claimants: Sequence[Reader] = ()
    members: Any
    config: Any
    tokenizer: Any
    member_heads: Any
    apart: Any

    @cached_property
    def readers_of_members(self) -> list[Reader]:
        """The readers of the members, in order: one of those that are one model, whatever they read before texts.

        Raises:
            InvalidInputError: if a member takes no cache.
        """
        found = dict[Any, Reader]()
        for i in range(len(self.members)):
            if self.key_of(i) not in found:
                found[self.key_of(i)] = self.new_reader(i, self.config.members[i], None)
        return [found[self.key_of(i)] for i in range(len(self.members))]

    @cached_property
    def alone(self) -> list[Alone]:
        """Each member by itself, over tokens of its own.

        Raises:
            InvalidInputError: if a member takes no cache.
            VocabularyMismatchError: if it cannot be read how the tokens of a member are spelled.
        """
        every: Any = self
        return [Alone(every, i, self.own_reader(i), self.own_spelling(i)) for i in range(len(self.members))]

    def own_reader(self, i: int) -> Reader:
        """Return the reader of member i over its own tokens."""
        return self.readers_of_members[i]

    def own_spelling(self, i: int) -> Spelling:
        """Return how the tokens of member i are spelled."""
        return spelling_of(self.config.members[i], self.tokenizer_of(i))

    @property
    def alphabet(self) -> Alphabet:
        """The symbols of the texts that members share, of which the first member says how many tokens they are."""
        return self.readers_of_members[0].alphabet

    def before_claims(self, prompt: Sequence[int], own: Sequence[Sequence[int] | None]) -> tuple[Sequence[int], int]:
        """Return the symbols that readers which claim read before a text: none, as they read the tokens of all."""
        return (), 0

    @contextmanager
    def without_claims(self) -> Iterator[None]:
        """Enter a context in which members alone are asked, as for what is measured of them."""
        before, self.claimants = self.claimants, ()
        try:
            yield
        finally:
            self.claimants = before

    def key_of(self, i: int) -> Any:
        """Return what members share if one reader reads for both."""
        return self.members[i]

    def new_reader(self, i: int, name: str, kept_tokens: int | None) -> Reader:
        """Make a reader of member i.

        Args:
            i: the member's number.
            name: its name in messages.
            kept_tokens: the most tokens of texts, of all together, whose keys and values are kept for texts that begin
                alike; None to keep those of what it reads before texts alone.

        Raises:
            InvalidInputError: if it takes no cache.
        """
        model, head = self.members[i], self.member_heads[i]
        if isinstance(model, ReaderModel):
            return GuardedReader(model.reader, head if isinstance(head, SoftmaxHead) else None)
        if others_than_keys_and_values(require_cache(model).config):
            return RecurrentReader(model, self.tokenizer_of(i), name, head)
        return TransformersReader(model, self.tokenizer_of(i), name, (), kept_tokens, head)

    def tokenizer_of(self, i: int) -> Any:
        """Return the tokenizer of member i's own tokens."""
        return self.tokenizer

    @property
    def reading(self) -> Members:
        """Those who read texts for this ensemble; rows of texts that nobody needs any more are closed first."""
        if self.garbage:
            self.close_dropped()
        return self._reading

    def close_dropped(self) -> None:
        """Close the rows of texts that nobody needs any more."""
        while self.garbage:
            reader, row = self.garbage.popleft()
            reader.close(row)

    @cached_property
    def _reading(self) -> Members:
        return Members(len(self.members), parallel=self.apart)

    def own_tokens(self, text: str) -> list[list[int]]:
        """Return for each member the tokens by which it reads a text by itself, without a prompt of its own."""
        return [self.tokenizer(text, verbose=False)["input_ids"] for _ in self.members]

    def forget_readers(self) -> None:
        """Have readers made anew, as after members were moved or cast."""
        for name in ("apart", "readers_of_members", "alone", "_reading"):
            self.__dict__.pop(name, None)
