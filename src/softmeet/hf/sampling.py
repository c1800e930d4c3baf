"""Sampling in which a row's tokens depend on its own generator alone, not on its batch-mates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor


class RowSampler(LogitsProcessor):
    """Draws each row's token by inverting its distribution at a number from the row's own generator.

    Comes last among the processors, after temperature and truncation, and leaves only the drawn token possible, so
    that whatever draws next can only draw that.

    Args:
        seed: of the whole call.
        keys: one per row; row k draws from the generator (seed, keys[k]).
    """

    def __init__(self, seed: int, keys: Sequence[int]) -> None:
        self._generators = [row_generator(seed, key) for key in keys]

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return scores that are 0 at the drawn token and -inf elsewhere."""
        drawn = draw(scores, self._generators)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn[:, None], 0.0)


def row_generator(seed: int, key: int) -> torch.Generator:
    """Make the generator (seed, key)."""
    # Distinct odd multipliers keep pairs apart over the range of generator seeds.
    mixed = (seed * 0x9E3779B97F4A7C15 + key * 0xD1B54A32D192ED03) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def draw(scores: Float[Tensor, "B v"], generators: Sequence[torch.Generator]) -> Int[Tensor, " B"]:
    """Draw one token per row from softmax(scores), by inverting it at a number from the row's generator."""
    u = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators]).to(scores.device)
    p = scores.double().softmax(-1)
    total = p.cumsum(-1)
    # Below the whole sum, whatever rounding makes of the product, so that the first entry past it has some mass.
    all_mass = total[:, -1]
    place = torch.minimum(u * all_mass, torch.nextafter(all_mass, torch.zeros_like(all_mass)))
    return torch.searchsorted(total, place[:, None], right=True).squeeze(-1)
