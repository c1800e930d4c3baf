"""Weights from how well each member predicts a prompt: the lower its perplexity, the greater its weight.

    w_i ∝ exp(-ℓ_i / τ),  ℓ_i the mean loss of member i on the prompt in nats per token, τ the temperature

as PackLLM weights its members before any search (Mavromatis et al., arXiv:2404.11531, PackLLM-sim).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
