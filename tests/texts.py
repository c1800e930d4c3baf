"""Texts for evaluations over tiny members."""

from __future__ import annotations

import torch

from softmeet.evaluation.documents import Document

LETTERS = "the quick brown fox jumps over a lazy dog and then it rains in spain"


def documents(count=12, length=40):
    """Texts that a first member half knows: half of the characters are its own guesses."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(len(LETTERS), (count, length), generator=generator)
    return [Document(f"d{k}", "".join(LETTERS[c] for c in row)) for k, row in enumerate(draw.tolist())]
