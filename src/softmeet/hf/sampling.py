"""Sampling in which each sequence draws its tokens from a random generator of its own.

So its tokens do not depend on the other sequences of the batch. Row k of a batch is sequence k's newest position.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from softmeet.errors import InvalidInputError


class RowSampler(LogitsProcessor):
    """A logits processor that draws each row's token, and forbids all other tokens.

    Put it after all other processors, those of temperature and truncation included. As only the drawn token stays
    possible, the sampling or search that follows has to choose it.

    Args:
        seed: the seed of the whole call, an integer.
        keys: an integer for each row of the batch (prompts times sequences of each); row k draws from
            ``row_generator(seed, keys[k])``. Rows with equal keys draw the same numbers.
    """

    def __init__(self, seed: int, keys: Sequence[int]) -> None:
        self._generators = [row_generator(seed, key) for key in keys]

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Draw a token for each row from softmax(scores), and return scores of 0 for it and -inf for all others."""
        drawn = draw(scores, self._generators)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn[:, None], 0.0)


def require_reproducible(drawn: bool, seed: int | None, token_seconds: float | None) -> None:
    """Raise InvalidInputError where a call's tokens cannot be the same every time: drawn without a seed, or by time."""
    if drawn and seed is None:
        raise InvalidInputError("expected a seed where tokens are drawn and have to be reproducible, got none")
    if token_seconds is not None:
        raise InvalidInputError(
            "expected no limit on a token's seconds where tokens have to be reproducible: what is reached in that time "
            "depends on what else the machine does"
        )


def row_generator(seed: int, key: int) -> torch.Generator:
    """Make the random generator, on the CPU, that belongs to the pair (seed, key); refuse a seed that is no integer."""
    if not isinstance(seed, Integral):
        raise InvalidInputError(f"expected a seed that is an integer, got {seed!r}")
    # Distinct odd multipliers keep pairs apart over the range of generator seeds.
    mixed = (int(seed) * 0x9E3779B97F4A7C15 + key * 0xD1B54A32D192ED03) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def draw(scores: Float[Tensor, "B v"], generators: Sequence[torch.Generator]) -> Int[Tensor, " B"]:
    """Draw one token id per row from softmax(scores).

    The row's cumulative distribution is inverted at a uniform number from the row's generator.

    Args:
        scores: (B, v), logits or log-probabilities in nats; -inf for an impossible token.
        generators: B generators, on the CPU; each is advanced by one number.
    """
    u = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators]).to(scores.device)
    p = scores.double().softmax(-1)
    total = p.cumsum(-1)
    # Rounding must not lift the product to the whole sum: then the first entry past it has some mass.
    all_mass = total[:, -1]
    place = torch.minimum(u * all_mass, torch.nextafter(all_mass, torch.zeros_like(all_mass)))
    return torch.searchsorted(total, place[:, None], right=True).squeeze(-1)
