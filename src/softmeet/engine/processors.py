"""Processors of scores beside transformers' own: each changes what can be drawn next, or how probable it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from softmeet.errors import InvalidInputError
from softmeet.readers.reader import Alphabet

# What can follow depends on so many symbols at most.
_REACH = 8


class MayFollow(LogitsProcessor):
    """A logits processor that forbids what cannot follow, such as bytes that do not continue the text as UTF-8.

    Args:
        alphabet: says what may follow.
    """

    def __init__(self, alphabet: Alphabet) -> None:
        self._alphabet = alphabet

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return ``scores`` with -inf at forbidden symbols; a row in which all others already have -inf is unchanged.

        Args:
            input_ids: (B, t), the symbols so far, of which the last are enough.
            scores: (B, v), scores of the next symbol.
        """
        return self.behind(input_ids[:, -_REACH:].tolist(), scores)

    def behind(self, texts: Sequence[Sequence[int]], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return what :meth:`__call__` does, with texts of any lengths, of which the last symbols are enough."""
        masks = [self._alphabet.may_follow(text) for text in texts]
        allowed = torch.stack([mask for mask in masks if mask is not None])
        found = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        # A text whose context is full ends within a character if it has to.
        return torch.where(found.isneginf().all(-1, keepdim=True), scores, found)


def following(alphabet: Alphabet) -> list[MayFollow]:
    """Return the processor that forbids what cannot follow; none for an alphabet of which anything can."""
    return [] if alphabet.may_follow([]) is None else [MayFollow(alphabet)]


class RepeatPenalties(LogitsProcessor):
    """OpenAI's penalties on tokens that were drawn before, as a logits processor of transformers.

    Args:
        prompt_length: the number of leading tokens that do not count.
        presence: nats subtracted once from the score of each token that was drawn before.
        frequency: nats subtracted from it for each time that it was drawn before.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._start, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return a copy of the scores, in nats, from which the penalties are subtracted.

        Args:
            input_ids: each row's tokens so far, prompt included.
            scores: each row's log-probabilities or scores of the next token, over v tokens.
        """
        new = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add(-1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class NoEndBefore(LogitsProcessor):
    """vLLM's ``min_tokens`` as a logits processor: a sequence does not end before it has so many new tokens.

    That of transformers, MinNewTokensLengthLogitsProcessor, needs to know the scores' device beforehand, and leaves no
    token possible where only an end was.

    Args:
        length: the number of tokens, prompt included, up to which none of ``ends`` can come.
        ends: the ids of the tokens that end a sequence.
    """

    def __init__(self, length: int, ends: Sequence[int]) -> None:
        self._length, self._ends = length, list(ends)

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return the scores, with -inf for the ends if ``input_ids`` has too few tokens and another one can come."""
        if input_ids.shape[-1] >= self._length:
            return scores
        found = scores.index_fill(-1, torch.tensor(self._ends, device=scores.device), -torch.inf)
        return torch.where(found.isneginf().all(-1, keepdim=True), scores, found)


class SomethingLeft(LogitsProcessor):
    """A logits processor that raises an error if options have forbidden every token that could come.

    Args:
        message: the error's: what could have come, and which options to change.
    """

    def __init__(self, message: str) -> None:
        self._message = message

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return the scores unchanged.

        Raises:
            InvalidInputError: if all scores of a row are -inf.
        """
        if bool(scores.isneginf().all(-1).any()):
            raise InvalidInputError(self._message)
        return scores
