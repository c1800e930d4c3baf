"""The noise that tokens are drawn by: a function of a seed, a sequence's number, a position and a token.

A token is drawn by the Gumbel-max trick (Maddison, Tarlow and Minka, A* Sampling, NeurIPS 2014): the largest sum of a
score and its own Gumbel noise is at token t with probability softmax(scores)[t]. The noise comes from a counter-based
generator (Philox, of Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), so it does not depend on
what else was drawn, or in which order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.errors import InvalidInputError

_BITS = 1 << 64
# Uniform numbers are multiples of 2⁻⁵³ below 1. Half of the least stands for 0, whose logarithm is infinite.
_LEAST = 2.0**-54


def require_seed(seed: int) -> int:
    """Return a seed as an int of 64 bits; a negative one counts from 2⁶⁴ down, as in torch.

    Raises:
        InvalidInputError: if it is no integer, below -2⁶³ or above 2⁶⁴ - 1.
    """
    if not isinstance(seed, Integral):
        raise InvalidInputError(f"expected a seed that is an integer, got {seed!r}")
    if not -_BITS // 2 <= seed < _BITS:
        raise InvalidInputError(f"expected a seed of 64 bits, from -2**63 to 2**64 - 1, got {seed}")
    return int(seed) % _BITS


def generator_of(seed: int) -> torch.Generator:
    """Return a generator for a seed, as :func:`require_seed` returns it.

    torch's on a CPU takes 32 bits of one: of a larger seed it gets those of a hash.
    """
    mixed = int.from_bytes(hashlib.sha256(seed.to_bytes(8, "little")).digest()[:4], "little")
    return torch.Generator().manual_seed(mixed if seed >> 32 else seed)


# What was drafted is soon drawn again, for the rule. A vector over 150,000 tokens takes 1.2 MB.
@lru_cache(maxsize=16)
def gumbel(seed: int, sequence: int, position: int, v: int) -> Float[Tensor, " v"]:
    """Return v independent numbers, fp64, of the standard Gumbel distribution, which the arguments determine.

    Different arguments give independent numbers; number t is the same for every v above t. They are kept for a while:
    do not change them in place.

    Args:
        seed: as :func:`require_seed` returns it.
        sequence: the number of the sequence among those of one seed, 0 or more.
        position: the number of tokens that were drawn before, 0 or more.
        v: the number of tokens.

    Example:
        >>> gumbel(1, 0, 5, 3).equal(gumbel(1, 0, 5, 8)[:3])
        True
    """
    bits = np.random.Philox(key=np.array([seed, sequence], np.uint64), counter=np.array([0, position, 0, 0], np.uint64))
    uniform = torch.from_numpy(np.random.Generator(bits).random(v))
    return uniform.clamp_min_(_LEAST).log_().neg_().log_().neg_()


def noisy(scores: Float[Tensor, "B v"], noise: Sequence[tuple[int, int, int] | None]) -> Float[Tensor, "B v"]:
    """Return scores to which each row's noise is added, fp64.

    Args:
        scores: (B, v), logits or log-probabilities in nats; -inf for an impossible token.
        noise: for each row the seed, sequence and position of its noise, as in :func:`gumbel`, or
            None.
    """
    found = scores.double() if scores.dtype != torch.float64 else scores.clone()
    for row, one in zip(found, noise, strict=True):
        if one is not None:
            row += gumbel(*one, scores.shape[-1]).to(row.device)
    return found
