"""Asking the other members only where the first one is unsure: the gate ``unsure`` while members run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.hf.cache import EnsembleCache, Lagging
from softmeet.hf.combining import Asked, rows_at_once
from softmeet.members.huggingface import last_hidden
from softmeet.rules.gates import Unsure

Each = Callable[[Callable[[int], Any], Sequence[int]], list[Any]]


def whom_to_ask(head: SoftmaxHead, gate: Unsure, hidden: Float[Tensor, "B d"]) -> Asked:
    """The rows at which the first member, whose head and hidden states these are, leaves the others to be asked."""
    chunk = rows_at_once(head.v, 1)
    if len(hidden) <= chunk:
        logits = head.logits(hidden)
        return Asked(gate.among(logits.log_softmax(-1)), logits)
    # Too many to keep: they are made again, some at a time, when they are combined.
    return Asked(torch.cat([gate.among(head.log_probs(part)) for part in hidden.split(chunk)]))


def ask(
    members: Sequence[PreTrainedModel],
    heads: Sequence[SoftmaxHead],
    each: Each,
    gate: Unsure | None,
    input_ids: Int[Tensor, "B t"],
    kept: slice | Int[Tensor, " k"],
    cache: EnsembleCache | None,
    attention_mask: Int[Tensor, "B s"] | None,
    **shared: Any,
) -> tuple[list[Float[Tensor, "B k _"]], Asked | None]:
    """Run the first member on new tokens, and the others on all that they have not run, in the rows that need it.

    A row needs it if the first member is unsure at one of the positions that are kept; positions of the others count a
    row's tokens, padding left out.

    Args:
        members, heads: of the ensemble, in order.
        each: ``map``, or one that uses threads.
        gate: None to ask everywhere, of a cache whose members may be behind.
        input_ids: the new tokens, or all where there is no cache.
        kept: the positions among them to be combined.
        cache: one with lagging members, or None.
        attention_mask: of all tokens so far; None for all ones.
        shared: of the first member's forward.

    Returns:
        (hidden states at the kept positions, zeros where a member was not asked; who was asked there, None for all).

    Raises:
        InvalidInputError: the cache's members all go together.
    """
    if cache is not None and not cache.lagging:
        raise InvalidInputError(
            "expected a cache whose members may be behind, for the gate 'unsure': make it with new_cache('unsure:…'), "
            "or go on with the gate that it was begun with"
        )
    own = None if cache is None else cache.members[0]
    first = last_hidden(members[0], input_ids, cache=own, attention_mask=attention_mask, **shared)[:, kept]
    started = time.perf_counter()
    seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
    seen = seen.bool().cpu()
    tokens = [ids[real].tolist() for ids, real in zip(input_ids.cpu(), seen, strict=True)]
    others = [Lagging() for _ in members[1:]] if cache is None else cache.members[1:]
    for member in others:
        member.follow(tokens)
    asked = None if gate is None else whom_to_ask(heads[0], gate, first.flatten(0, 1))
    if asked is not None:
        # There is nobody to ask about padding.
        there = seen[:, kept if isinstance(kept, slice) else kept.cpu()]
        asked.rows = asked.rows & there.flatten().to(asked.rows.device)
        rows = asked.rows.view(first.shape[:2]).any(-1).nonzero().squeeze(-1).cpu()
    else:
        rows = torch.tensor([row for row, own_tokens in enumerate(tokens) if own_tokens], dtype=torch.int64)

    def catch_up(i: int) -> Float[Tensor, "B t d"]:
        return _caught_up(members[i], heads[i], others[i - 1], rows, seen, first)

    found = each(catch_up, range(1, len(members)))
    if asked is not None and len(rows):
        asked.seconds = time.perf_counter() - started
    return [first, *(states[:, kept] for states in found)], asked


def _caught_up(
    model: PreTrainedModel,
    head: SoftmaxHead,
    member: Lagging,
    rows: Int[Tensor, " k"],
    seen: Bool[Tensor, "B t"],
    like: Float[Tensor, "B _ _"],
) -> Float[Tensor, "B t d"]:
    """A member's hidden states at the new tokens of some rows; zeros elsewhere."""
    home = head.weight
    out = torch.zeros(*seen.shape, head.d, dtype=like.dtype, device=home.device)
    if not len(rows):
        return out
    hidden = member.run(model, rows)
    out = out.to(hidden[0].dtype)
    for row, states in zip(rows.tolist(), hidden, strict=True):
        columns = seen[row].nonzero().squeeze(-1)
        out[row, columns.to(out.device)] = states[len(states) - len(columns) :].to(out.device)
    return out
