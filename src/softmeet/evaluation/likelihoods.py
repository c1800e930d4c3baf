"""The likelihoods of texts behind others, which every member reads once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.readers.reader import Read, Reader, finished


@dataclass(frozen=True)
class Likelihood:
    """How likely a text is behind another.

    Attributes:
        log_prob: the ensemble's log-probability of it, in nats.
        greedy: whether each of its symbols is the most probable one.
        members: each member's own log-probability of it, in nats.
    """

    log_prob: float
    greedy: bool
    members: tuple[float, ...]


@torch.inference_mode()
def likelihoods(model: Any, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Likelihood]:
    """Score continuations of contexts; a context of neighbours is read once by each member.

    Args:
        model: an ensemble's, over tokens or bytes; its own settings hold.
        pairs: (the symbols of a context, those of its continuation), at least one of each.

    Yields:
        the likelihood of each continuation, in order.

    Raises:
        InvalidInputError: if a context with its continuation exceeds a member's context.
    """
    for before, group in groupby(pairs, key=lambda pair: tuple(pair[0])):
        yield from _behind(model, before, [after for _, after in group])


def _behind(model: Any, before: Sequence[int], texts: Sequence[Sequence[int]]) -> list[Likelihood]:
    states = list[Tensor]()
    for i in range(len(model.members)):
        own, skipped = model.before(i, before, ())
        states.append(_read(model.readers_of_members[i], own, skipped, before, texts))
    own, skipped = model.before_claims(before, ())
    states += [_read(reader, own, skipped, before, texts) for reader in model.claimants]
    every, found, start = torch.tensor([symbol for text in texts for symbol in text]), list[Tensor](), 0
    for part in model.combiner.combined(states, model.combiner.resolved(model.settings)):
        members, solution = part.solved
        told = torch.cat([solution.log_probs[None].to(members.dtype), members])
        targets = every[start : start + told.shape[1]].to(told.device)
        likely = told.gather(-1, targets.expand(len(told), -1)[..., None]).squeeze(-1).double()
        found.append(torch.cat([likely, (solution.log_probs.argmax(-1) == targets)[None]]).cpu())
        start += told.shape[1]
    sizes = [len(text) for text in texts]
    return [
        Likelihood(float(one[0].sum()), bool(one[-1].all()), tuple(one[1:-1].sum(-1).tolist()))
        for one in torch.cat(found, -1).split(sizes, -1)
    ]


def _read(
    reader: Reader, own: Sequence[int], skipped: int, before: Sequence[int], texts: Sequence[Sequence[int]]
) -> Float[Tensor, "k _"]:
    """Return what a member predicts before each symbol of some texts behind symbols, as its hidden states."""
    symbols, found = list(before)[skipped:], list[Tensor]()
    row = reader.open(symbols, own)
    try:
        first = finished(reader.read([Read(row, symbols[row.known :], [len(symbols) - row.known])]))
        for text in texts:
            more = finished(reader.read([Read(row, text[:-1], range(1, len(text)), keep=False)]))
            for error in (*first.errors.values(), *more.errors.values()):
                raise error
            found += [first.states(), *([more.states()] if len(text) > 1 else [])]
    finally:
        reader.close(row)
    return torch.cat(found)
