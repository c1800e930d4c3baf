"""``TopUnion``: members over the union of the strings that each of them finds the likeliest, anew at each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmeet.engine.combine import Combiner, Hidden
from softmeet.members.opaque import Head

# Returns what stands for a symbol that a member lacks; None of a symbol that it has.
Stand = Callable[[int], int | None]


class TopUnion(Combiner):
    """A combiner of members over a union of tokens, of which at each place some symbols alone can follow.

    These are the k likeliest symbols of each member, and any as likely as the k-th. For one that it lacks, a member has
    the probability of the first symbol as which it would read it, but 0 where that is among them itself. Symbols of
    probability 0 are never among them (after UniTE, Yao et al., 2024, https://arxiv.org/abs/2410.03777).

    Args:
        names, heads: as of :class:`Combiner`.
        k: the number of symbols of each member.
        stands: of each member, what stands for a symbol that it lacks.
    """

    joint = True

    def __init__(self, names: Sequence[str], heads: Sequence[Head], k: int, stands: Sequence[Stand]) -> None:
        super().__init__(names, heads)
        self._k, self._stands = min(k, self.v), stands

    def _own_logits(self, hidden: Hidden, *, native: bool = False) -> list[Float[Tensor, "B v"]]:
        """Return each member's log-probabilities in nats up to a constant, -inf where a symbol is not among them."""
        told = super()._own_logits(hidden, native=native)
        among = torch.stack([self._top(own) for own in told]).any(0)
        return [self._within(own, among, stand) for own, stand in zip(told, self._stands, strict=True)]

    def _top(self, own: Float[Tensor, "B v"]) -> Bool[Tensor, "B v"]:
        return (own >= own.topk(self._k).values[:, -1:]) & ~own.isneginf()

    def _within(self, own: Float[Tensor, "B v"], among: Bool[Tensor, "B v"], stand: Stand) -> Float[Tensor, "B v"]:
        rows, symbols = among.nonzero(as_tuple=True)
        values = own[rows, symbols]
        for j in values.isneginf().nonzero().flatten().tolist():
            piece = stand(int(symbols[j]))
            if piece is not None and not among[rows[j], piece]:
                values[j] = own[rows[j], piece]
        return torch.full_like(own, -torch.inf).index_put((rows, symbols), values)
