"""The normalisation before a softmax head, and the directions of a hidden state that it takes away."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True, eq=False)
class FinalNorm:
    """The normalisation h = γ ⊙ x̂ + β with x̂ = x / rms(x), or (x - mean(x)) / std(x) where ``centred``.

    Args:
        gain: γ, (d,), any floating dtype, none of it zero; None for ones.
        bias: β, (d,), any floating dtype; None for zeros.
        centred: whether it is a LayerNorm rather than an RMS norm.
    """

    gain: Float[Tensor, " d"] | None = None
    bias: Float[Tensor, " d"] | None = None
    centred: bool = False

    def lost_directions(self, hidden: Float[Tensor, "B d"]) -> Float[Tensor, "B k d"]:
        """Find the directions u with uᵀ ∂h/∂x = 0 at each hidden state, which no gradient in x can see.

        The Jacobian of x̂ maps onto what is orthogonal to x̂ (and, centred, to 1), so u = x̂ / γ (and 1 / γ).

        Args:
            hidden: the norm's outputs h.

        Returns:
            For each h, k = 1 direction, or 2 where ``centred``, of length 1, in the dtype of ``hidden``.

        Example:
            >>> FinalNorm(gain=torch.tensor([1.0, 2.0])).lost_directions(torch.tensor([[3.0, 16.0]]))
            tensor([[[0.6000, 0.8000]]])
        """
        gain = torch.ones_like(hidden[0]) if self.gain is None else self.gain.to(hidden)
        shift = torch.zeros_like(gain) if self.bias is None else self.bias.to(hidden)
        found = [(hidden - shift) / gain / gain]
        if self.centred:
            found.append((1 / gain).expand_as(hidden))
        lost = torch.stack(found, dim=-2)
        return normalize(lost, dim=-1, eps=torch.finfo(lost.dtype).tiny)
