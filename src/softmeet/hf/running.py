"""Running an ensemble's members on new tokens: all of them, or under the gate ``unsure`` those that are asked.

A *sequence* is a row of the batch that is generated: a prompt and its continuation so far.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.hf.cache import EnsembleCache, Lagging
from softmeet.hf.call_options import CallOptions
from softmeet.hf.contexts import ContextRows, OwnPrompt, stamp_of, units
from softmeet.hf.deferral import Deferral, Drawn
from softmeet.hf.quick import weights_of
from softmeet.members.huggingface import last_hidden
from softmeet.members.opaque import Head
from softmeet.members.partial_cache import PartialCache
from softmeet.rules.gates import Unsure

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble

Kept = slice | Int[Tensor, " k"]


@dataclass(frozen=True, eq=False)
class NewTokens:
    """The new tokens of one forward pass, and where the members are to be combined.

    Attributes:
        model: the ensemble.
        ids: (B, t), the new tokens that members share.
        kept: the k positions among them at which the members are to be combined.
        cache: of the tokens before them; None if there is none.
        shared: keyword arguments of the members' own ``forward``.
        own: for each prompt what members read in its place; None for no prompts of their own.
    """

    model: AnyEnsemble
    ids: Int[Tensor, "B t"]
    kept: Kept
    cache: EnsembleCache | None
    shared: dict[str, Any]
    own: Sequence[OwnPrompt] | None = None

    @cached_property
    def first(self) -> bool:
        """Whether the sequences begin with these tokens."""
        return self.cache is None or not self.cache.get_seq_length()

    @cached_property
    def real(self) -> Bool[Tensor, "B t"]:
        """True at new tokens, False at padding; on the CPU."""
        mask = self.shared.get("attention_mask")
        return (torch.ones_like(self.ids) if mask is None else mask[:, -self.ids.shape[1] :]).bool().cpu()

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The new tokens of each sequence, without padding."""
        return [ids[real].tolist() for ids, real in zip(self.ids.cpu(), self.real, strict=True)]

    @cached_property
    def columns(self) -> Int[Tensor, " k"]:
        """The indices of the kept positions among the new tokens, on the CPU."""
        return torch.arange(self.ids.shape[1])[self.kept if isinstance(self.kept, slice) else self.kept.cpu()]

    @cached_property
    def needed(self) -> int:
        """For how many of the last columns hidden states are needed."""
        return self.ids.shape[1] - int(self.columns.min()) if len(self.columns) else 0

    def rows(self, i: int) -> list[list[int]]:
        """Return the new tokens of each sequence that member i reads: at its beginning also what is the member's own.

        Raises:
            InvalidInputError: if the members are to be combined at positions that a prompt of its own does not have.
        """
        if not self.first:
            return self.tokens
        contexts, own, many = self.model.contexts, self.own, len(self.tokens)
        if own is None:
            return [contexts.first_row(i, ids) for ids in self.tokens]
        if many % len(own):
            raise InvalidInputError(f"expected prompts for {many} sequences, got {len(own)}")
        each = [one for one in own for _ in range(many // len(own))]
        if any(one.ids[i] is not None and self.needed > self.ids.shape[1] - one.replaced + 1 for one in each):
            raise InvalidInputError(
                "expected to combine members behind their prompts alone, as these differ: pass logits_to_keep=1"
            )
        return [contexts.first_row(i, ids, one) for ids, one in zip(self.tokens, each, strict=True)]

    def hidden(self, i: int) -> Float[Tensor, "B k d"]:
        """Run member i by itself; returns its last hidden states at the kept positions."""
        own = None if self.cache is None else self.cache.members[i]
        return last_hidden(self.model.members[i], self.ids, self.kept, cache=own, **self.shared)

    def hidden_of(self, group: Sequence[int], cache: ContextRows) -> list[Float[Tensor, "B k d"]]:
        """Run members of one model as rows of one batch; returns each one's last hidden states."""
        contexts, many = self.model.contexts, len(group)
        each = [self.rows(i) for i in group]
        pairs = [(i, own[b]) for b in range(len(self.ids)) for i, own in zip(group, each, strict=True)]
        # What is kept of prompts is of the weights as they were then.
        stamp = stamp_of(self.model.members[group[0]]) if self.first else None
        new = [
            contexts.begun(i, row, min(self.needed, len(row)), stamp) if self.first else PartialCache((), tuple(row))
            for i, row in pairs
        ]
        states = cache.run(self.model.members[group[0]], new, self.ids.shape[1], newest=self.needed == 1)
        if self.first:
            for k, done in enumerate(cache.apart()):
                contexts.keep(group[k % many], each[k % many][k // many], done, stamp)
        # Without a new token there are no states.
        everyone, dtype = torch.arange(len(states) // many), self.model.member_heads[group[0]].dtype
        return [self.spread(states[k::many], self.model.member_heads[i], everyone, dtype) for k, i in enumerate(group)]

    def spread(
        self, states: Sequence[Float[Tensor, "_ d"]], head: Head, rows: Int[Tensor, " r"], dtype: torch.dtype
    ) -> Float[Tensor, "B k d"]:
        """Put hidden states of some sequences into the columns of their new tokens, with zeros everywhere else.

        Args:
            states: for each of ``rows``, hidden states whose last ones are of its new tokens; of a prompt of its own,
                fewer than the sequence has columns.
            head: the member's head, for width and device.
            rows: (r,), the numbers of the sequences.
            dtype: of the result if ``rows`` is empty; else it is that of ``states``.

        Returns:
            (B, k, d), at the kept positions.
        """
        place, start = head.device, self.ids.shape[1] - self.needed
        real, dtype = self.real[:, start:], states[0].dtype if states else dtype
        out = torch.zeros(*real.shape, head.d, dtype=dtype, device=place)
        for row, own in zip(rows.tolist(), states, strict=True):
            columns = real[row].nonzero().squeeze(-1)
            count = min(len(own), len(columns))
            out[row, columns[len(columns) - count :].to(place)] = own[len(own) - count :].to(place)
        return out if len(self.columns) == self.needed else out[:, (self.columns - start).to(place)]


def run_members(
    new: NewTokens, options: CallOptions | None
) -> tuple[list[Float[Tensor, "B k _"]], Deferral | Drawn | None]:
    """Run the members on new tokens, as :meth:`EnsembleForCausalLM.run` does.

    Raises:
        InvalidInputError: if the cache was made for another gate, or for members without prompts of their own.
    """
    unsure, cache = None if options is None else options.unsure, new.cache
    if options is not None and options.one_member:
        return _run_drawn(new, weights_of(options.settings))
    if cache is not None and cache.first_lags:
        raise InvalidInputError("expected one_member for a cache that was begun with it")
    if unsure is None and (cache is None or not cache.lagging):
        return _run_all(new), None
    if cache is not None and not cache.lagging:
        raise InvalidInputError(
            "expected a cache whose members may be behind, for the gate 'unsure': make it with "
            "new_cache('unsure:…'), or go on with the gate that it was begun with"
        )
    return _run_where_unsure(new, unsure)


def _groups(new: NewTokens) -> list[list[int]]:
    """Return the groups of members that are rows of one batch.

    Raises:
        InvalidInputError: if the cache was made for other groups.
    """
    contexts, cache = new.model.contexts, new.cache
    if cache is None:
        return contexts.batched(new.own)
    if new.own is not None and not new.first:
        return cache.batched
    wanted = contexts.batched(new.own)
    if cache.batched != wanted:
        raise InvalidInputError("expected a cache for members with prompts of their own: new_cache(own_prompts=…)")
    return wanted


def _run_all(new: NewTokens) -> list[Float[Tensor, "B k _"]]:
    """Run all members: those of one model with prefixes or prompts of their own in one batch, each other one alone."""
    model, groups, n = new.model, _groups(new), len(new.model.members)
    if not groups:
        return model.each(new.hidden, range(n))
    parts = units(groups, n)

    def hidden(k: int) -> list[Float[Tensor, "B k _"]]:
        if k >= len(groups):
            return [new.hidden(parts[k][0])]
        known = None if new.cache is None else new.cache.members[parts[k][0]]
        return new.hidden_of(parts[k], known or ContextRows(len(parts[k])))

    found = dict[int, Float[Tensor, "B k _"]]()
    for part, states in zip(parts, model.each(hidden, range(len(parts))), strict=True):
        found |= zip(part, states, strict=True)
    return [found[i] for i in range(n)]


def _run_drawn(new: NewTokens, weights: Sequence[float]) -> tuple[list[Float[Tensor, "B k _"]], Drawn]:
    """Draw a member for each sequence by its weight, and run it on all tokens that it has not run yet.

    Returns:
        (each member's last hidden states at the newest position, (B, 1, d_i), zeros in sequences for which it was not
        drawn; the members that were).

    Raises:
        InvalidInputError: if more than the newest position is asked for, or there is no cache that was made for it.
    """
    cache, model = new.cache, new.model
    if cache is None or not cache.first_lags or new.needed != 1:
        raise InvalidInputError(
            "expected one_member in a call of generate, with its cache: each token is drawn from one member, and the "
            "others have not run"
        )
    n = len(model.members)
    for i in range(n):
        cache.members[i].follow(new.rows(i))
    drawn = torch.multinomial(torch.tensor(weights, dtype=torch.float64), len(new.ids), replacement=True)

    def hidden(i: int) -> Float[Tensor, "B k _"]:
        rows = (drawn == i).nonzero().squeeze(-1)
        states = cache.members[i].run(model.members[i], rows, newest=True)
        return new.spread(states, model.member_heads[i], rows, model.member_heads[i].dtype)

    return model.each(hidden, range(n)), Drawn(drawn)


def _run_where_unsure(new: NewTokens, gate: Unsure | None) -> tuple[list[Float[Tensor, "B k _"]], Deferral | None]:
    """Run the first member, and the others in the sequences that need them, on all tokens that they have not run yet.

    A sequence needs them if at one of its kept positions the first member is unsure: its most probable token has a
    probability below ``gate.threshold``. In the other sequences the new tokens are noted as pending.

    Args:
        new: the new tokens; their cache has a :class:`Lagging` layer for each member after the first.
        gate: the gate that decides whether the first member is unsure; None to run every sequence.

    Returns:
        (each member's last hidden states at the kept positions, (B, k, d_i), zeros in sequences in which it did not
        run; the positions, sequence by sequence, at which the first member is unsure and defers to the others, None if
        ``gate`` is None).
    """
    model, n = new.model, len(new.model.members)
    caches: list[Any] = [None, *(Lagging() for _ in range(1, n))] if new.cache is None else new.cache.members
    alone = not any(0 in group for group in _groups(new))
    first = new.hidden(0) if alone else new.hidden_of([0], caches[0] or ContextRows(1))[0]
    started = time.perf_counter()
    for i in range(1, n):
        caches[i].follow(new.rows(i))
    deferral = None if gate is None else model.combiner.deferral(gate, first.flatten(0, 1))
    if deferral is None:
        rows = torch.tensor([row for row, own in enumerate(new.tokens) if own], dtype=torch.int64)
    else:
        # Positions of padding do not make a sequence need the other members.
        there = new.real[:, new.kept if isinstance(new.kept, slice) else new.kept.cpu()]
        deferral.rows = deferral.rows & there.flatten().to(deferral.rows.device)
        rows = deferral.rows.view(first.shape[:2]).any(-1).nonzero().squeeze(-1).cpu()

    def hidden(i: int) -> Float[Tensor, "B k _"]:
        states = caches[i].run(model.members[i], rows, newest=new.needed == 1)
        return new.spread(states, model.member_heads[i], rows, first.dtype)

    others = model.each(hidden, range(1, n))
    if deferral is not None and len(rows):
        deferral.seconds = time.perf_counter() - started
    return [first, *others], deferral
