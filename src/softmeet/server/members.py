"""The members of a server with their running batches: they run the tokens of sequences, and know the keys and values.

Usually each member runs the newest tokens of all its sequences in one batch. The result for a sequence then depends on
the batch up to rounding. If members are *reproducible*, every sequence is run by itself, at the price of the batch: its
numbers are the same, to the last bit, whoever else is served.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from softmeet.errors import NonFiniteError
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.server.batch import MemberBatch, Part
from softmeet.server.byte_batch import ByteBatch
from softmeet.server.gating import Hidden
from softmeet.server.sequences import Runner, Sequence
from softmeet.server.together import Together


class Members:
    """The members of all ensembles of a server, each once, with its batch of running sequences.

    Args:
        names: for each member, which is in evaluation mode, its name in messages.
        kept_tokens: for each member, the most prompt tokens whose keys and values are kept; 0 if ``reproducible``.
        parallel: whether members run at the same time, in a thread each; it pays if they are on different devices, and
            "auto" measures whether it does for the newest tokens of so many sequences.
        reproducible: whether every sequence is run by itself.

    Raises:
        InvalidInputError: if a member's cache holds anything but keys and values, as a recurrent model's does.
    """

    def __init__(
        self, names: dict[Runner, str], kept_tokens: int, *, parallel: bool | Literal["auto"], reproducible: bool
    ) -> None:
        # A prompt that begins like an earlier one would be run in other pieces, and so rounded otherwise.
        kept = 0 if reproducible else kept_tokens
        self._batches: dict[Any, MemberBatch | ByteBatch] = {
            _key(member): ByteBatch(name, member) if isinstance(member, ByteMember) else MemberBatch(name, member, kept)
            for member, name in names.items()
        }
        self._together = Together(len(names), parallel)
        self._reproducible = reproducible

    @property
    def cache_bytes(self) -> int:
        """The bytes of all keys and values in the batches and of kept prompts."""
        return sum(batch.cache_bytes for batch in self._batches.values())

    @property
    def kept_tokens(self) -> int:
        """The number of prompt tokens whose keys and values are kept for later prompts, summed over members."""
        return sum(batch.kept_tokens for batch in self._batches.values())

    def step(self, ready: list[Sequence]) -> dict[Sequence, Hidden]:
        """Run the newest token of sequences by the members in each one's ``batched``.

        Args:
            ready: the sequences, whose members have run all tokens but the newest.

        Returns:
            for each sequence, the last hidden states of each of these members at its newest token, (1, d_i).
        """
        if self._reproducible:
            return {s: self.catch_up([s], members=slice(len(s.batched)))[s] for s in ready}
        parts: dict[MemberBatch | ByteBatch, list[Part]] = defaultdict(list)
        for s in ready:
            for i in range(len(s.batched)):
                parts[self._batch(s, i)].append((s, i))
        found: dict[Part, Float[Tensor, "1 d"]] = {}
        steps = self._together.measured(lambda batch: batch.step(parts[batch]), list(parts), len(ready))
        for own, out in zip(parts.values(), steps, strict=True):
            found |= {part: out[k : k + 1] for k, part in enumerate(own)}
        return {s: [found[s, i] for i in range(len(s.batched))] for s in ready}

    def read(self, s: Sequence, i: int, tokens: list[int]) -> Float[Tensor, "t d"]:
        """Run member i of a sequence, over tokens, on those that follow what it has run, while all others wait.

        Returns:
            (t, d), the last hidden states at the t tokens, at least one.
        """
        return self._over_tokens(s, i).read(s, i, tokens)

    def forget(self, s: Sequence, i: int, count: int) -> None:
        """Take back the last ``count`` tokens that member i of a sequence has run by :meth:`read`."""
        self._over_tokens(s, i).forget(s, i, count)

    def _over_tokens(self, s: Sequence, i: int) -> MemberBatch:
        batch = self._batch(s, i)
        assert isinstance(batch, MemberBatch)
        return batch

    def catch_up(
        self,
        sequences: list[Sequence],
        *,
        members: slice,
        every: bool = False,
        pause: Callable[[], None] = lambda: None,
    ) -> dict[Sequence, Hidden]:
        """Run members on the tokens of sequences that they have not run yet, each member on all sequences together.

        Args:
            sequences: at least one token of each is new to each of the members.
            members: the members to run, as a slice of each sequence's ``members``.
            every: as of :meth:`MemberBatch.catch_up`.
            pause: called between the pieces of a long prompt, if members do not run in threads of their own.

        Returns:
            for each sequence, the last hidden states of each of those members at the t tokens that it ran, (t, d_i);
            without ``every``, perhaps at the newest alone.
        """
        if self._reproducible and len(sequences) > 1:
            return {s: self.catch_up([s], members=members, every=every, pause=pause)[s] for s in sequences}
        behind: dict[MemberBatch | ByteBatch, list[Part]] = defaultdict(list)
        for s in sequences:
            for i in range(len(s.members))[members]:
                behind[self._batch(s, i)].append((s, i))
        # A task can be suspended in its own thread alone.
        between = (lambda: None) if self._together.parallel is True else pause
        hidden: dict[Part, Float[Tensor, "t _"]] = {}
        runs = self._together.map(lambda batch: batch.catch_up(behind[batch], every=every, pause=between), list(behind))
        for entries, states in zip(behind.values(), runs, strict=True):
            hidden |= zip(entries, states, strict=True)
        return {s: [hidden[s, i] for i in range(len(s.members))[members]] for s in sequences}

    def close(self, s: Sequence) -> None:
        """Give the keys and values of a sequence up."""
        for i in range(len(s.members)):
            self._batch(s, i).close(s, i)

    def _batch(self, s: Sequence, i: int) -> MemberBatch | ByteBatch:
        """Return the batch that runs member i of a sequence."""
        return self._batches[_key(s.members[i])]

    @staticmethod
    def reused(s: Sequence) -> int:
        """Return how many tokens of a prompt :meth:`catch_up` did not run by any of its members; over bytes none."""
        return min(s.reused[: len(s.batched)])

    def check_finite(self, s: Sequence, hidden: Hidden, first: int = 0) -> None:
        """Raise NonFiniteError with the names of the members at fault if any hidden state of a sequence is not finite.

        Args:
            s: the sequence.
            hidden: the last hidden states, (t, d_i), of its members, or of some that follow each other; over bytes
                their log-probabilities, which may be -inf, and come from hidden states that are finite.
            first: the number of the first of these members.
        """
        if s.combination.over_bytes:
            return
        bad = [self._batch(s, i).name for i, h in enumerate(hidden, first) if not h.isfinite().all()]
        if bad:
            raise NonFiniteError(
                f"expected finite hidden states, got NaN or an infinity from {', '.join(bad)}: leave it out of this "
                "request, or change the prompt"
            )


def _key(member: Runner) -> Any:
    """Return what a member's batch is found by: over bytes its model and spelling, whatever it reads before texts."""
    return (member.model, member.spelling) if isinstance(member, ByteMember) else member
