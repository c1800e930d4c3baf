"""Running the other members of a cascade only in rows where the first one is unsure: the gate ``unsure``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.heads import SoftmaxHead
from softmeet.hf.cache import Lagging
from softmeet.hf.combining import Deferral
from softmeet.rules.gates import Unsure


def run_others(
    each: Callable[[Callable[[int], Any], Sequence[int]], list[Any]],
    members: Sequence[PreTrainedModel],
    heads: Sequence[SoftmaxHead],
    lagging: Sequence[Lagging],
    first: Float[Tensor, "B k d"],
    kept: slice | Int[Tensor, " k"],
    input_ids: Int[Tensor, "B t"],
    attention_mask: Int[Tensor, "B s"] | None,
    gate: Unsure | None,
) -> tuple[list[Float[Tensor, "B k _"]], Deferral | None]:
    """Run all members but the first, on all that they have not run yet, in the rows that need it.

    A row needs it if the first member is unsure at one of the positions that are kept.

    Args:
        each: ``map`` over the members' numbers, or one that uses threads.
        members, heads: of the ensemble, in order.
        lagging: for each member but the first, what it has run of each row, and what not.
        first: the first member's last hidden states at the kept positions.
        kept: the positions among the new tokens that are to be combined.
        input_ids: the new tokens.
        attention_mask: of all tokens so far; None where there is no padding.
        gate: None to run all rows.

    Returns:
        (each member's hidden states at the kept positions, zeros where it was not run; the positions at which all
        members ran, None for all).
    """
    started = time.perf_counter()
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
    real = real.bool().cpu()
    tokens = [ids[own].tolist() for ids, own in zip(input_ids.cpu(), real, strict=True)]
    for member in lagging:
        member.follow(tokens)
    deferral = None if gate is None else Deferral.of(heads[0], gate, first.flatten(0, 1))
    if deferral is None:
        rows = torch.tensor([row for row, own in enumerate(tokens) if own], dtype=torch.int64)
    else:
        # Nobody is asked about padding.
        there = real[:, kept if isinstance(kept, slice) else kept.cpu()]
        deferral.rows = deferral.rows & there.flatten().to(deferral.rows.device)
        rows = deferral.rows.view(first.shape[:2]).any(-1).nonzero().squeeze(-1).cpu()

    def hidden(i: int) -> Float[Tensor, "B k _"]:
        states = lagging[i - 1].run(members[i], rows)
        return _spread_over_rows(states, heads[i], rows, real, first.dtype)[:, kept]

    others = each(hidden, range(1, len(members)))
    if deferral is not None and len(rows):
        deferral.seconds = time.perf_counter() - started
    return [first, *others], deferral


def _spread_over_rows(
    states: Sequence[Float[Tensor, "_ d"]],
    head: SoftmaxHead,
    rows: Int[Tensor, " r"],
    real: Bool[Tensor, "B t"],
    dtype: torch.dtype,
) -> Float[Tensor, "B t d"]:
    """Put hidden states of some rows, which end with their new tokens, where these are; zeros elsewhere."""
    out = torch.zeros(*real.shape, head.d, dtype=states[0].dtype if states else dtype, device=head.weight.device)
    for row, own in zip(rows.tolist(), states, strict=True):
        columns = real[row].nonzero().squeeze(-1)
        out[row, columns.to(out.device)] = own[len(own) - len(columns) :].to(out.device)
    return out
