"""The gate ``unsure`` at work: members after the first run only in sequences at which the first is unsure.

A *sequence* is a row of the batch: a prompt and its continuation so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.hf.cache import Lagging
from softmeet.hf.combining import Combiner, Deferral
from softmeet.members.opaque import Head
from softmeet.rules.gates import Unsure


def run_others(
    each: Callable[[Callable[[int], Any], Sequence[int]], list[Any]],
    members: Sequence[PreTrainedModel],
    combiner: Combiner,
    lagging: Sequence[Lagging],
    first: Float[Tensor, "B k d"],
    kept: slice | Int[Tensor, " k"],
    input_ids: Int[Tensor, "B t"],
    attention_mask: Int[Tensor, "B s"] | None,
    gate: Unsure | None,
) -> tuple[list[Float[Tensor, "B k _"]], Deferral | None]:
    """Run members after the first in the sequences that need them, on all tokens that they have not run yet.

    A sequence needs them if at one of its kept positions the first member is unsure: its most probable token has a
    probability below ``gate.threshold``. In the other sequences the new tokens are noted as pending in ``lagging``.

    Args:
        each: a function such as :meth:`EnsembleForCausalLM.each`: called with (a function of a member's number, some
            members' numbers from 0), it returns a list of the results; it may call the function in threads.
        members, combiner: all members, in evaluation mode, and the combiner of their heads.
        lagging: the cache layer of each member after the first, as in :attr:`EnsembleCache.members`, or new layers if
            there is no cache; changed in place.
        first: (B, k, d), the first member's last hidden states at the kept positions.
        kept: the k positions among the new tokens at which the members are to be combined.
        input_ids: (B, t), the new tokens.
        attention_mask: (B, s), 0 at padding, over all tokens so far; None if there is no padding.
        gate: the gate that decides whether the first member is unsure; None to run every sequence.

    Returns:
        (each member's last hidden states at the kept positions, (B, k, d_i), zeros in sequences in which it did not
        run; the positions, sequence by sequence, at which the first member is unsure and defers to the others, None if
        ``gate`` is None).
    """
    started = time.perf_counter()
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
    real = real.bool().cpu()
    tokens = [ids[own].tolist() for ids, own in zip(input_ids.cpu(), real, strict=True)]
    for member in lagging:
        member.follow(tokens)
    deferral = None if gate is None else combiner.deferral(gate, first.flatten(0, 1))
    if deferral is None:
        rows = torch.tensor([row for row, own in enumerate(tokens) if own], dtype=torch.int64)
    else:
        # Positions of padding do not make a sequence need the other members.
        there = real[:, kept if isinstance(kept, slice) else kept.cpu()]
        deferral.rows = deferral.rows & there.flatten().to(deferral.rows.device)
        rows = deferral.rows.view(first.shape[:2]).any(-1).nonzero().squeeze(-1).cpu()

    newest = isinstance(kept, slice) and kept.start == -1

    def hidden(i: int) -> Float[Tensor, "B k _"]:
        states = lagging[i - 1].run(members[i], rows, newest=newest)
        if newest:
            return _spread_over_rows(states, combiner.heads[i], rows, real[:, kept], first.dtype)
        return _spread_over_rows(states, combiner.heads[i], rows, real, first.dtype)[:, kept]

    others = each(hidden, range(1, len(members)))
    if deferral is not None and len(rows):
        deferral.seconds = time.perf_counter() - started
    return [first, *others], deferral


def _spread_over_rows(
    states: Sequence[Float[Tensor, "_ d"]],
    head: Head,
    rows: Int[Tensor, " r"],
    real: Bool[Tensor, "B t"],
    dtype: torch.dtype,
) -> Float[Tensor, "B t d"]:
    """Put hidden states of some sequences into the columns of their new tokens, with zeros everywhere else.

    Args:
        states: for each of ``rows``, hidden states whose last ones are of its new tokens.
        head: the member's head, for width and device.
        rows: (r,), the numbers of the sequences.
        real: (B, t), True at new tokens and False at padding.
        dtype: of the result if ``rows`` is empty; else it is that of ``states``.
    """
    out = torch.zeros(*real.shape, head.d, dtype=states[0].dtype if states else dtype, device=head.device)
    for row, own in zip(rows.tolist(), states, strict=True):
        columns = real[row].nonzero().squeeze(-1)
        out[row, columns.to(out.device)] = own[len(own) - len(columns) :].to(out.device)
    return out
