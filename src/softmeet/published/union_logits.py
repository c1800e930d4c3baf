"""A reader over a union whose hidden states are its logits over its own tokens."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from softmeet.errors import SoftmeetError
from softmeet.readers.reader import Predictions
from softmeet.readers.union_reader import OverUnion, UnionReader


class UnionLogits(OverUnion):
    """What a member predicts, over a union; its hidden states are logits over its own tokens."""

    def hidden(self, places: slice | Int[Tensor, " k"] = slice(None)) -> Float[Tensor, "k d"]:
        """Return the member's logits over its own tokens, in nats, at some places."""
        return self.told.logits(self.which[places])


class UnionLogitsReader(UnionReader):
    """A reader over a union, for what combines members by their logits over their own tokens."""

    def over(
        self, told: Predictions, which: Int[Tensor, " k"], counts: Sequence[int], errors: dict[int, SoftmeetError]
    ) -> UnionLogits:
        """Return what the member predicts, over the union, from what it predicts over its own tokens."""
        return UnionLogits(self, told, which, counts, errors)
