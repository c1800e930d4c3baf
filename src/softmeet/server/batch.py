"""One member of a server over tokens: it runs the tokens of sequences, each of which may come and go at any token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.members.huggingface import require_cache
from softmeet.members.partial_cache import layers_of_keys_and_values
from softmeet.readers.blocks import Seat
from softmeet.readers.kv import KeysAndValues
from softmeet.readers.prefixes import PrefixCache
from softmeet.readers.reader import finished
from softmeet.server.sequences import Sequence

# A sequence, and which of its members this one is; an ensemble may have a model several times, with prompts of its own.
Part = tuple[Sequence, int]


class MemberBatch:
    """One member with the keys and values of its sequences and of earlier prompts.

    A sequence's ``trails[i]`` is its :class:`~softmeet.readers.blocks.Seat` among them.

    Args:
        name: the member's name in messages.
        model: the member, in evaluation mode; it becomes ``member``.
        kept_tokens: the most prompt tokens, over all prompts, whose keys and values are kept for later prompts.

    Raises:
        InvalidInputError: if the member takes no cache, or its cache holds anything but keys and values.
    """

    def __init__(self, name: str, model: PreTrainedModel, kept_tokens: int = 16384) -> None:
        self.name, self.member = name, model
        require_cache(model)
        layers_of_keys_and_values(name, model.config, "its rows cannot join a running batch; use softmeet generate")
        self._kv = KeysAndValues(model)
        self._prefixes = PrefixCache[Seat](kept_tokens, self._kv.leave)

    @property
    def cache_bytes(self) -> int:
        """The number of bytes of all keys and values, with room for more."""
        return self._kv.bytes

    @property
    def kept_tokens(self) -> int:
        """The number of prompt tokens whose keys and values are kept for later prompts."""
        return self._prefixes.tokens

    def catch_up(
        self, behind: list[Part], *, every: bool = False, pause: Callable[[], None] = lambda: None
    ) -> list[Float[Tensor, "t d"]]:
        """Run the member on all tokens of sequences that it has not run, such as prompts.

        Args:
            behind: at least one token of each is new to the member.
            every: whether to run all tokens of a prompt that the member has not begun; else the keys and values of
                those with which an earlier prompt began too are taken from the cache of prompts.
            pause: called between the pieces of many tokens.

        Returns:
            for each sequence the last hidden states at the t tokens that were run, (t, d); with ``every`` of a new
            prompt those alone that all members share, without it perhaps that at the newest token alone.
        """
        begun = [s.trails[i] is None for s, i in behind]
        rows = [self._begun(s, i, every=every) for s, i in behind]
        hidden, _ = finished(self._kv.read(rows, None if every else 1), pause)
        for (s, i), new, states in zip(behind, begun, hidden, strict=True):
            prompt = s.read_by(i)
            if new and bool(states.isfinite().all()) and self._prefixes.wants(prompt):
                self._prefixes.keep(prompt, self._kv.alone(s.trails[i], len(prompt)))
        # What is a member's own comes before what all share.
        return [states[-len(s.tokens) :] for (s, _), states in zip(behind, hidden, strict=True)] if every else hidden

    def _begun(self, s: Sequence, i: int, *, every: bool) -> tuple[Seat, list[int]]:
        """Return the seat of a sequence, of a new one with what an earlier prompt has of it, and what is not run."""
        tokens = [*s.read_by(i), *s.tokens[len(s.prompt) :]]
        if s.trails[i] is None:
            s.reused[i], kept = (0, None) if every else self._prefixes.longest(tokens)
            s.trails[i] = Seat() if kept is None else self._kv.alone(kept, s.reused[i])
        return s.trails[i], tokens[s.trails[i].length :]

    def step(self, parts: list[Part]) -> Float[Tensor, "B d"]:
        """Run the member on the newest token of sequences, of which it has run all others, in one call.

        Returns:
            (B, d), the last hidden states at these tokens.
        """
        seats = [s.trails[i] for s, i in parts]
        ran = self._kv.run(seats, [s.tokens[-1:] for s, _ in parts])
        for seat, (columns, _) in zip(seats, ran, strict=True):
            self._kv.keep(seat, columns)
        return torch.cat([states for _, states in ran])

    def read(self, s: Sequence, i: int, tokens: list[int]) -> Float[Tensor, "t d"]:
        """Run the member on tokens that follow what it has run of a sequence; returns the last hidden states there."""
        return finished(self._kv.read([(s.trails[i], tokens)]))[0][0]

    def forget(self, s: Sequence, i: int, count: int) -> None:
        """Take back the last ``count`` tokens that were run of a sequence."""
        seat = s.trails[i]
        seat.path = seat.path[: seat.length - count]

    def close(self, s: Sequence, i: int) -> None:
        """Give the keys and values of a sequence up."""
        if s.trails[i] is not None:
            self._kv.leave(s.trails[i])
