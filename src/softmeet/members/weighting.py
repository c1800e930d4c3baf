"""Weights from how well each member predicts a prompt: the lower its perplexity, the more it counts.

    w_i ∝ exp(-ℓ_i / τ),  ℓ_i the member's mean loss on the prompt in nats per token

as PackLLM weights its members before any search (Mavromatis et al., arXiv:2404.11531, PackLLM-sim).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def perplexity_weights(nats: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Compute weights that sum to one, from each member's nats per token on a prompt.

    Args:
        nats: the lower, the heavier the member.
        temperature: nats by which a member has to be worse to weigh e times less.

    Example:
        >>> [round(w, 3) for w in perplexity_weights([2.0, 3.0])]
        [0.731, 0.269]
    """
    losses = torch.tensor(list(nats), dtype=torch.float64)
    return [float(w) for w in (-losses / temperature).softmax(0)]
