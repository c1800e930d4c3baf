"""A sequence in the running batch."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.hf.combining import Deferral
from softmeet.members.partial_cache import KeysValues, PartialCache
from softmeet.server.sampling import Sampler
from softmeet.server.work import Sequence


class Row:
    """A sequence and how far its members have come with it.

    Attributes:
        tokens: its prompt and what was drawn.
        states: of the prompt, for the members that will have it in their batches.
        trails: what the members know of it that are only asked where the first is unsure; empty without that gate.
        ahead: hidden states of those at the newest token, where they have them already.
        asked: whether they are, at this step; ``spent`` is the row's part of the seconds that it took.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.tokens = list(sequence.prompt)
        self.sampler = Sampler(sequence.sampling, sequence.prompt)
        self.states: list[list[KeysValues]] = []
        self.joined = self.done = False
        gated = sequence.work.combination.unsure is not None
        self.trails = [PartialCache()] * (len(self.members) - 1) if gated else []
        self.ahead: list[Float[Tensor, "1 _"]] = []
        self.asked: Deferral | None = None
        self.spent = 0.0

    @property
    def members(self) -> list[PreTrainedModel]:
        """All that are combined."""
        return list(self.sequence.work.combination.model.members)

    @property
    def batched(self) -> list[PreTrainedModel]:
        """Those of them that run the row in their batches."""
        return self.members[: len(self.members) - len(self.trails)]

    @property
    def drawn(self) -> int:
        """How many tokens were drawn."""
        return len(self.tokens) - len(self.sequence.prompt)
