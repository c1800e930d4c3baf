"""The normalisation before a softmax head, and the directions of a hidden state that it removes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True, eq=False)
class FinalNorm:
    """A model's last normalisation, which makes the hidden state h = γ ⊙ x̂ + β of its input x.

    x̂ is x / rms(x), or, if ``centred``, (x - mean(x)) / std(x).

    Args:
        gain: γ, (d,), any floating dtype, no entry zero; None for ones.
        bias: β, (d,), any floating dtype; None for zeros.
        centred: whether this is a LayerNorm rather than an RMS norm.
    """

    gain: Float[Tensor, " d"] | None = None
    bias: Float[Tensor, " d"] | None = None
    centred: bool = False

    def lost_directions(self, hidden: Float[Tensor, "B d"]) -> Float[Tensor, "B k d"]:
        """Compute the directions u in which h cannot move at all when the norm's input x moves: uᵀ ∂h/∂x = 0.

        The range of ∂x̂/∂x is the complement of x̂ (if ``centred``, of x̂ and 1), so u = x̂ / γ (and 1 / γ).

        Args:
            hidden: the norm's outputs h.

        Returns:
            For each h, k = 1 direction, or 2 if ``centred``, each of length 1, in the dtype of ``hidden``.

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
