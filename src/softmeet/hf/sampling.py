"""Sampling in which each sequence's tokens follow from a seed and its own distributions.

So they do not depend on the other sequences of the batch, nor on the order in which positions are computed. Row k of a
batch is sequence k's newest position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from softmeet.engine.draw import Noise, choose
from softmeet.errors import InvalidInputError


class RowSampler(LogitsProcessor):
    """A logits processor that draws each row's token, and forbids all other tokens.

    Put it after all other processors, those of temperature and truncation included. As only the drawn token stays
    possible, the sampling or search that follows has to choose it. The texts that it is first called with are prompts.

    Args:
        seed: the seed of the whole call, an integer.
        keys: an integer for each row of the batch (prompts times sequences of each); the noise of row k's position t,
            counted from its prompt's end, is ``gumbel(seed, keys[k], t, v)``. Rows with equal keys have equal noise.
    """

    def __init__(self, seed: int, keys: Sequence[int]) -> None:
        self._noise = Noise(seed, keys)

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Draw a token for each row from softmax(scores), and return scores of 0 for it and -inf for all others."""
        drawn = choose(scores, self._noise.at(input_ids.shape[1]))
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn[:, None], 0.0)


def require_reproducible(drawn: bool, seed: int | None, options: Mapping[str, Any]) -> None:
    """Raise InvalidInputError where a call's tokens cannot be the same every time, to the last bit.

    Args:
        drawn: whether tokens are drawn.
        seed: the call's, or None.
        options: the call's other options, of which ``token_seconds`` and ``speculate`` are refused.
    """
    if drawn and seed is None:
        raise InvalidInputError("expected a seed where tokens are drawn and have to be reproducible, got none")
    if options.get("speculate"):
        raise InvalidInputError(
            "expected no speculation where tokens have to be reproducible: rounding depends on how many tokens members "
            "read at once"
        )
    if options.get("token_seconds") is not None:
        raise InvalidInputError(
            "expected no limit on a token's seconds where tokens have to be reproducible: what is reached in that time "
            "depends on what else the machine does"
        )
