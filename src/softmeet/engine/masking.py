"""The masking of scores by a :class:`softmeet.structured.structure.Structure`, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from softmeet.engine.continuation import Ensembled
from softmeet.errors import InvalidInputError
from softmeet.members.spelling import token_bytes
from softmeet.structured.structure import Structure


class Mask:
    """A structure over the tokens of one ensemble, compiled: what each of its texts may go on with.

    Args:
        structure: the structure.
        tokenizer: the ensemble's tokenizer.
        ends: the ids of all tokens that end a text, at least one.
        v: the number of tokens, at least the tokenizer's.

    Attributes:
        ends: as given.

    Raises:
        InvalidInputError: if there is no end, the tokenizer's tokens cannot be read as bytes, or the structure is too
            complex over these tokens.
    """

    def __init__(self, structure: Structure, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], v: int) -> None:
        from llguidance import LLMatcher

        from softmeet.structured.worker import LIMITS

        if not ends:
            raise InvalidInputError("expected an ensemble with an end-of-text token for structured output, got none")
        self.ends, self._v = frozenset(ends), v
        vocabulary = _vocabulary(tokenizer, tuple(ends), v)
        self._make = partial(LLMatcher, vocabulary, structure.lark, log_level=0, limits=LIMITS)
        self._matcher = self._make()
        _require_well(self._matcher)

    def begin(self) -> RowMask:
        """Return the state of a text that begins."""
        return RowMask(self._matcher.deep_copy(), self._make, self.ends, self._v)


class RowMask:
    """What one text may go on with; made by :meth:`Mask.begin`."""

    def __init__(self, matcher: Any, make: Callable[[], Any], ends: frozenset[int], v: int) -> None:
        self._matcher, self._make, self._ends, self._v = matcher, make, ends, v
        self._read: list[int] = []

    def allowed(self, tokens: list[int]) -> Bool[Tensor, " v"] | None:
        """Return which tokens, (v,), may follow a text; an end of text may where the text is complete.

        Args:
            tokens: the ids of the text's tokens, whatever was asked for before; it is quick if they go on from there.

        Returns:
            the mask; None if the text has ended, or has a token that was not allowed.

        Raises:
            InvalidInputError: if the structure is too complex to go on, or allows nothing more.
        """
        if self._matcher is None:
            self._matcher, self._read = self._make(), []
        try:
            return self._allowed(tokens)
        except InvalidInputError:
            # A matcher that has failed fails ever after, as do its copies, even if the text was only tried.
            self._matcher = None
            raise

    def _allowed(self, tokens: list[int]) -> Bool[Tensor, " v"] | None:
        """Do as :meth:`allowed`; after an error the matcher is of no use."""
        if not self._ends.isdisjoint(tokens):
            return None
        if tokens[: len(self._read)] != self._read:
            # Beams change places, and tokens that were only tried are taken back.
            same = next((k for k, (a, b) in enumerate(zip(tokens, self._read, strict=False)) if a != b), len(tokens))
            self._matcher.rollback(len(self._read) - same)
            del self._read[same:]
        new = tokens[len(self._read) :]
        count = self._matcher.try_consume_tokens(new)
        self._read += new[:count]
        _require_well(self._matcher)
        if count < len(new):
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _require_well(self._matcher)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little", count=self._v).view(np.bool_))


def mask_of(structure: Structure, model: Ensembled, generation_config: Any) -> Mask:
    """Return the mask of a structure over an ensemble's tokens.

    Raises:
        InvalidInputError: if it cannot be used with them, or what can follow is what members find the likeliest alone.
    """
    if model.combiner.joint:
        raise InvalidInputError(
            "a structure may need what is not among the likeliest of any member, of which this vocabulary is made: say "
            "vocabulary='union', or bytes"
        )
    assert model.tokenizer is not None
    return Mask(structure, model.tokenizer, ends_of(generation_config), model.combiner.v)


def ends_of(generation_config: Any) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text, as transformers' generation configuration has them."""
    found = generation_config.eos_token_id
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


class Structured(LogitsProcessor):
    """A logits processor that leaves to each row of a batch only the tokens with which its text can go on.

    Put it before all others, so that what truncates counts only these tokens.

    Args:
        mask: the structure over the ensemble's tokens.
        prompt_length: the number of leading tokens of each row that are not part of the text.
    """

    def __init__(self, mask: Mask, prompt_length: int) -> None:
        self._mask, self._start = mask, prompt_length
        self._rows: list[RowMask] = []

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return a copy of the scores with -inf at tokens that are not allowed; rows that have ended stay as they are.

        Args:
            input_ids: each row's tokens so far, prompt included.
            scores: each row's scores, or log-probabilities in nats.

        Raises:
            InvalidInputError: if the structure is too complex to go on, or nothing that it allows is possible.
        """
        texts, found = input_ids[:, self._start :].tolist(), scores.clone()
        self._rows += [self._mask.begin() for _ in range(len(texts) - len(self._rows))]
        for own, text, row in zip(found, texts, self._rows, strict=False):
            if (allowed := row.allowed(text)) is not None:
                self._apply(own, allowed.to(own.device))
        return found

    def _apply(self, own: Float[Tensor, " v"], allowed: Bool[Tensor, " v"]) -> None:
        """Set the scores of a row's forbidden tokens to -inf, unless only an end is possible: then the text is cut."""
        masked = own.masked_fill(~allowed, -torch.inf)
        if masked.isneginf().all():
            ended = own.clone()
            ended[list(self._mask.ends)] = -torch.inf
            if ended.isneginf().all():
                return
            raise InvalidInputError(
                "the members give no probability to anything that the structure allows here: allow more, or leave out "
                "options that forbid tokens"
            )
        own.copy_(masked)


def _require_well(matcher: Any) -> None:
    """Raise InvalidInputError if a matcher has met a limit, or has come to where nothing is allowed."""
    if matcher.is_error():
        why = str(matcher.get_error()).splitlines()[0][:200]
        raise InvalidInputError(f"expected a structure that can be followed to its end, got one that cannot: {why}")


@lru_cache(maxsize=16)
def _vocabulary(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], v: int) -> Any:
    """Return a tokenizer's vocabulary as llguidance has it; of 150,000 tokens it takes half a second."""
    from softmeet.structured.worker import vocabulary

    words = token_bytes(tokenizer)
    if not words:
        raise InvalidInputError(
            "expected members whose tokens can be read as bytes for structured output (byte-level BPE, or "
            "SentencePiece with byte fallback), got others: choose such members"
        )
    special = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special} - {*ends}
    return vocabulary([words.get(k, b"") for k in range(v)], ends, sorted(special))
