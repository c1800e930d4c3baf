"""Weights from how well each member predicts a prompt: the lower its perplexity, the more it counts.

    w_i ∝ exp(-ℓ_i / τ),  ℓ_i the member's mean loss on the prompt in nats per token

as PackLLM weights its members before any search (Mavromatis et al., arXiv:2404.11531, PackLLM-sim).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def perplexity_weights(nats: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Weights that sum to one, from each member's nats per token on a prompt."""
    losses = torch.tensor(list(nats), dtype=torch.float64)
    return [float(w) for w in (-losses / temperature).softmax(0)]
