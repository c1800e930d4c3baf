"""A member of an ensemble by itself, over tokens of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedTokenizerBase

from softmeet.decoders.own_tokens import OwnTokens
from softmeet.engine.ask import Members
from softmeet.engine.combine import Combiner
from softmeet.engine.continuation import Own
from softmeet.members.spelling import Spelling
from softmeet.members.vocabulary import token_support
from softmeet.readers.reader import Reader

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
