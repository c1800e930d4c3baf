"""Weights from how well each member predicts a prompt, or a text so far: the lower its loss, the greater its weight.

    w_i ∝ exp(-ℓ_i / τ),  ℓ_i the mean loss of member i on the prompt in nats per token, τ the temperature

as PackLLM weights its members before any search (Mavromatis et al., arXiv:2404.11531, PackLLM-sim). Weights that adapt
to a text as it goes have in place of ℓ_i a mean over what came before, in which a token counts the less the further
back it is; they are those of a Bayesian mixture with a prior and a memory that fades.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A token's loss counts as at most so many nats.
_MOST = 50.0


def perplexity_weights(nats: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Compute the members' weights w_i ∝ exp(-ℓ_i / τ) from their losses ℓ_i on a prompt; the weights sum to 1.

    Args:
        nats: ℓ_i, each member's mean loss in nats per token, all finite; at least one.
        temperature: τ > 0, in nats: the difference in loss at which one weight is e times the other.

    Example:
        >>> [round(w, 3) for w in perplexity_weights([2.0, 3.0])]
        [0.731, 0.269]
    """
    losses = torch.tensor(list(nats), dtype=torch.float64)
    return [float(w) for w in (-losses / temperature).softmax(0)]


def weights_by(log_probs: Float[Tensor, "n t v"], targets: Int[Tensor, " t"]) -> list[float]:
    """Return the weights of :func:`perplexity_weights` by members' log-probabilities, in nats, of what has come."""
    came = targets.to(log_probs.device).expand(len(log_probs), -1)[..., None]
    return perplexity_weights((-log_probs.gather(-1, came)).squeeze(-1).mean(-1).tolist())


@dataclass(frozen=True)
class Adaptation:
    """How weights adapt to a text: w_i ∝ w_i⁰ exp(-(1 - γ) Σ_s γ^(t-1-s) ℓ_i(s) / τ) at position t, s < t.

    Attributes:
        decay: γ, from 0 to below 1: how much a token counts beside the one after it.
        temperature: τ > 0, in nats: the difference in mean loss at which one weight is e times the other.
    """

    decay: float
    temperature: float

    def weights(
        self, prior: Sequence[float], nats: Float[Tensor, "n N"], document: Int[Tensor, " N"]
    ) -> Float[Tensor, "n N"]:
        """Return the members' weights at every position of some documents, which depend on earlier positions alone.

        Args:
            prior: w_i⁰, the weights at a document's start; they sum to 1.
            nats: ℓ_i, the members' losses at each position, in nats.
            document: the document of each position; those of one document are together, in order.

        Example:
            >>> losses = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
            >>> Adaptation(0.5, 0.5).weights([0.5, 0.5], losses, torch.tensor([0, 0, 1]))[0].tolist()
            [0.5, 0.7310585786300049, 0.5]
        """
        before = faded(nats, document, self.decay)
        return (torch.tensor(list(prior), dtype=nats.dtype).log()[:, None] - before / self.temperature).softmax(0)


def faded(nats: Float[Tensor, "n N"], document: Int[Tensor, " N"], decay: float) -> Float[Tensor, "n N"]:
    """Return (1 - γ) Σ_s γ^(t-1-s) ℓ(s) over the earlier positions s of each position's document, (n, N), in nats.

    Arguments are as in :class:`Adaptation`; a loss counts as at most 50 nats, as an infinite one would leave a member
    without weight for ever.
    """
    found, gained = torch.zeros_like(nats), (1 - decay) * nats.clamp_max(_MOST)
    for t in range(1, len(document)):
        if document[t] == document[t - 1]:
            found[:, t] = decay * found[:, t - 1] + gained[:, t - 1]
    return found
