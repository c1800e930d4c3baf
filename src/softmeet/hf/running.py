"""Running an ensemble's members on new tokens of a batch: all of them, or those that are asked.

A *sequence* is a row of the batch that is generated: a prompt and its continuation so far.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.engine.continuation import Dropped
from softmeet.engine.deferral import Deferral
from softmeet.engine.gate import OTHERS
from softmeet.errors import InvalidInputError
from softmeet.hf.cache import EnsembleCache
from softmeet.hf.call_options import CallOptions
from softmeet.hf.refused import require_context
from softmeet.members.opaque import Head
from softmeet.members.trunk import last_hidden, takes_cache
from softmeet.readers.reader import Predictions, Work
from softmeet.readers.transformers import States
from softmeet.rules.gates import Unsure

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble

Kept = slice | Int[Tensor, " k"]
_log = logging.getLogger("softmeet")


@dataclass(frozen=True, eq=False)
class NewTokens:
    """The new tokens of one forward pass, and where the members are to be combined.

    Attributes:
        model: the ensemble.
        ids: (B, t), the new tokens that members share.
        kept: the k positions among them at which the members are to be combined.
        cache: of the tokens before them; None if there is none.
        options: those of the call; None for none.
        shared: keyword arguments of the members' own ``forward``.
    """

    model: AnyEnsemble
    ids: Int[Tensor, "B t"]
    kept: Kept
    cache: EnsembleCache | None
    options: CallOptions | None
    shared: dict[str, Any]

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

    @property
    def is_direct(self) -> bool:
        """Whether every member reads these tokens alone, in one call of its model that keeps nothing."""
        own, options = self.model.contexts, self.options
        plain = options is None or (options.own_prompts is None and options.unsure is None and not options.one_member)
        return self.cache is None and plain and self.model.begin is None and not any(own.prefixes)

    @cached_property
    def texts(self) -> list[Dropped]:
        """The sequences, with the new tokens, of which members have read those before."""
        cache = EnsembleCache() if self.cache is None else self.cache
        width = self.ids.shape[1]
        self._check_positions([len(one.tokens) for one in cache.texts] or [0] * len(self.tokens))
        if not cache.texts:
            cache.begin(begun(self.model, self.tokens, self.options), width)
            self._check_own(cache.texts)
        elif len(cache.texts) != len(self.tokens):
            raise InvalidInputError(f"expected tokens of {len(cache.texts)} sequences, got {len(self.tokens)}")
        else:
            cache.add(self.tokens, width)
        return cache.texts

    def _check_positions(self, before: Sequence[int]) -> None:
        """Check that positions, if they are given, count each sequence's tokens, as those of readers do."""
        given = self.shared.get("position_ids")
        if given is None:
            return
        given = given[..., -self.ids.shape[1] :].expand(self.ids.shape).cpu()
        counted = self.real.long().cumsum(-1) - 1 + torch.tensor(before)[:, None]
        if not torch.equal(given[self.real], counted[self.real]):
            raise InvalidInputError(
                "expected position_ids that count the tokens of each sequence from 0: leave them out, or pass "
                "use_cache=False"
            )

    def _check_own(self, texts: Sequence[Dropped]) -> None:
        """Check that the members are combined at no position that a prompt of its own does not have."""
        width = self.ids.shape[1]
        for one in texts:
            if one.own and one.prompt and self.needed > width - len(one.prompt) + 1:
                raise InvalidInputError(
                    "expected to combine members behind their prompts alone, as these differ: pass logits_to_keep=1"
                )

    def read(self, texts: Sequence[Dropped], members: slice) -> list[Float[Tensor, "B k d"]]:
        """Have members read on in some of the sequences; returns each one's last hidden states, zeros in the others."""
        found = self.model.reading.read_on(texts, members, every=self.needed > 1)
        for one in found:
            one.check()
            said_full(one)
        numbers = {id(one): k for k, one in enumerate(self.texts)}
        rows = torch.tensor([numbers[id(one)] for one in found], dtype=torch.int64)
        heads = self.model.combiner.heads[members]
        return [self.spread([own[i] for own in found.values()], head, rows) for i, head in enumerate(heads)]

    def hidden(self, i: int) -> Float[Tensor, "B k d"]:
        """Run member i by itself, without a cache; returns its last hidden states at the kept positions."""
        return last_hidden(self.model.members[i], self.ids, self.kept, **self.shared)

    def spread(
        self, states: Sequence[Float[Tensor, "_ d"]], head: Head, rows: Int[Tensor, " r"]
    ) -> Float[Tensor, "B k d"]:
        """Put hidden states of some sequences into the columns of their new tokens, with zeros everywhere else.

        Args:
            states: for each of ``rows``, hidden states whose last ones are of its new tokens; of a prompt of its own,
                fewer than the sequence has columns.
            head: the member's head, for width, device and, without states, dtype.
            rows: (r,), the numbers of the sequences.

        Returns:
            (B, k, d), at the kept positions.
        """
        place, start = head.device, self.ids.shape[1] - self.needed
        real, dtype = self.real[:, start:], states[0].dtype if states else head.dtype
        out = torch.zeros(*real.shape, head.d, dtype=dtype, device=place)
        for row, own in zip(rows.tolist(), states, strict=True):
            columns = real[row].nonzero().squeeze(-1)
            count = min(len(own), len(columns))
            out[row, columns[len(columns) - count :].to(place)] = own[len(own) - count :].to(place)
        return out if len(self.columns) == self.needed else out[:, (self.columns - start).to(place)]


def said_full(text: Dropped) -> None:
    """Say in the log, once, that a text has to end."""
    if text.is_full and not text.noted:
        text.noted = True
        _log.warning("a text ends because the context of %s is full", ", ".join(text.full_members))


def begun(model: AnyEnsemble, tokens: Sequence[Sequence[int]], options: CallOptions | None) -> list[Dropped]:
    """Make the texts of sequences that begin, with what members read of their own.

    Args:
        model: the ensemble.
        tokens: the first tokens of each sequence.
        options: those of the call; None for none.

    Raises:
        InvalidInputError: if own prompts are given for a number that does not divide that of the sequences.
    """
    own = None if options is None else options.own_prompts
    if own is None:
        return [Dropped(model, one) for one in tokens]
    if not own or len(tokens) % len(own):
        before = own and not own[0].replaced
        what = f"prefixes for each of {len(tokens)} prompts" if before else f"prompts for {len(tokens)} sequences"
        raise InvalidInputError(f"expected {what}, got {len(own)}")
    each = [one for one in own for _ in range(len(tokens) // len(own))]
    found = []
    for one, ids in zip(each, tokens, strict=True):
        text = Dropped(model, ids[: one.replaced], one.ids)
        text.tokens = list(ids)
        found.append(text)
    return found


def rereads(model: AnyEnsemble) -> bool:
    """Return whether a member takes no cache, so that no reader can be had of it, and texts are read anew each time."""
    return not all(map(takes_cache, model.members))


def read_once(model: AnyEnsemble, input_ids: Int[Tensor, "1 t"]) -> list[Predictions]:
    """Have every member read one text, as to score it; returns what each predicts behind each of its t tokens.

    Nothing that is kept of texts is shared, so that several threads may do so at the same time.

    Args:
        model: the ensemble.
        input_ids: (1, t), the text; over bytes a first symbol 256 begins it, and its first byte is predicted, too.

    Raises:
        InvalidInputError: if the text exceeds a member's context, or a member has a template.
        NonFiniteError: if a member's hidden states hold NaN or an infinity.
    """
    require_context(model.config, input_ids.shape[1])
    model.contexts.require_no_template()
    tokens, anew = input_ids[0].tolist(), rereads(model)
    return model.each(lambda i: _read_once(model, i, tokens, anew=anew), range(len(model.members)))


def _read_once(model: AnyEnsemble, i: int, tokens: list[int], *, anew: bool) -> Predictions:
    """Have one member read a text, ``anew`` by its model alone."""
    if anew:
        states = last_hidden(model.members[i], torch.tensor([tokens]), use_cache=False)[0]
        return States(model.member_heads[i], states, [len(tokens)], {}, Work())
    reader, (own, skipped) = model.readers_of_members[i], model.before(i, tokens, ())
    symbols = tokens[skipped:]
    # Behind the last of its own tokens, a first token in whose place it reads them is predicted, too.
    with reader.to_itself():
        return reader.read_whole([symbols], [range(1 - skipped, len(symbols) + 1)], own)


def run_members(new: NewTokens) -> tuple[list[Float[Tensor, "B k _"]], Deferral | None]:
    """Run the members on new tokens, as :meth:`EnsembleForCausalLM.run` does."""
    options, model = new.options, new.model
    if new.is_direct:
        return model.each(new.hidden, range(len(model.members))), None
    if options is not None and options.one_member:
        raise InvalidInputError(
            "expected one_member in a call of generate: each token is drawn from one member, and the others have not "
            "read"
        )
    found, deferral = _asked(new, None if options is None else options.unsure)
    for k, one in enumerate(new.texts):
        if one.is_full:
            # If one member's context is full, the sequence has to end for all of them.
            for i, reader in enumerate(one.readers):
                found[i][k, -1:] = -torch.inf
                found[i][k, -1:, sorted(reader.alphabet.ends)] = 0.0
    return found, deferral


def _asked(new: NewTokens, gate: Unsure | None) -> tuple[list[Float[Tensor, "B k _"]], Deferral | None]:
    """Have all members read, or under a gate those that are asked."""
    if gate is None:
        return new.read(new.texts, slice(None)), None
    model = new.model
    (first,) = new.read(new.texts, slice(1))
    started = time.perf_counter()
    deferral = model.combiner.deferral(gate, first.flatten(0, 1))
    # Positions of padding do not make a sequence need the other members.
    there = new.real[:, new.kept if isinstance(new.kept, slice) else new.kept.cpu()]
    deferral.rows = deferral.rows & there.flatten().to(deferral.rows.device)
    asked = deferral.rows.view(first.shape[:2]).any(-1).tolist()
    others = new.read([one for one, wanted in zip(new.texts, asked, strict=True) if wanted], OTHERS)
    if any(asked):
        deferral.seconds = time.perf_counter() - started
    return [first, *others], deferral
