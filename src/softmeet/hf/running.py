"""Running an ensemble's members on new tokens of a batch: all of them, or those that are asked.

A *sequence* is a row of the batch that is generated: a prompt and its continuation so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmeet.engine.combine import Deferral
from softmeet.engine.continuation import Dropped
from softmeet.engine.step import end_full, joined, read, require_read
from softmeet.errors import InvalidInputError
from softmeet.hf.cache import EnsembleCache
from softmeet.hf.call_options import CallOptions
from softmeet.hf.contexts import OwnPrompt
from softmeet.hf.refused import require_context
from softmeet.members.trunk import last_hidden, takes_cache
from softmeet.readers.reader import Predictions, Work
from softmeet.readers.transformers import States
from softmeet.rules.problem import TokensBefore

if TYPE_CHECKING:
    from softmeet.engine.continuation import Ensembled
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
        options: those of the call.
        shared: keyword arguments of the members' own ``forward``.
    """

    model: AnyEnsemble
    ids: Int[Tensor, "B t"]
    kept: Kept
    cache: EnsembleCache | None
    options: CallOptions
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
        options, model = self.options, self.model
        plain = options.own_prompts is None and options.unsure is None and not options.one_member
        as_given = model.begin is None and not model.cuts_alone and not model.claimants
        return self.cache is None and plain and as_given and not any(model.contexts.prefixes)

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

    def behind(self, k: int, count: int) -> tuple[Int[Tensor, " r"], Int[Tensor, " r"]]:
        """Return at which kept positions sequence k has tokens behind which members predict, and which predictions.

        Args:
            k: the sequence's number.
            count: of how many of the last tokens there are predictions: of a prompt of its own, fewer than columns.

        Returns:
            (indices of kept positions; of predictions, counted from the end, from -1).
        """
        left = self.real[k].long().flip(-1).cumsum(-1).flip(-1)[self.columns]
        there = self.real[k][self.columns] & (left <= count)
        return there.nonzero().squeeze(-1), -left[there]


@dataclass(frozen=True, eq=False)
class Behind:
    """What members predict behind tokens of a batch of B sequences, of which k positions each are kept.

    Attributes:
        hidden: each member's last hidden states at r of the B · k positions, (r, d_i); zeros if it did not read.
        at: (r,), which ones these are.
        asked: at which of them all members have read, under the gate ``unsure``; else None.
        texts: the sequences; none of those that members read without keeping anything.
    """

    hidden: Sequence[Float[Tensor, "r _"]]
    at: Int[Tensor, " r"]
    asked: Deferral | None = None
    texts: Sequence[Dropped] = ()


def begun(model: Ensembled, tokens: Sequence[Sequence[int]], options: CallOptions) -> list[Dropped]:
    """Make the texts of sequences that begin, with what members read of their own.

    Args:
        model: the ensemble, or one of its members by itself.
        tokens: the first tokens of each sequence.
        options: those of the call.

    Raises:
        InvalidInputError: if own prompts are given for a number that does not divide that of the sequences.
    """
    own = options.own_prompts
    found = [Dropped(model, one) for one in tokens] if own is None else _behind_own(model, tokens, own)
    for text in found:
        text.given = options.given
    return found


def _behind_own(model: Ensembled, tokens: Sequence[Sequence[int]], own: Sequence[OwnPrompt]) -> list[Dropped]:
    """Make the texts of sequences that begin with what members read in place of prompts, or before them."""
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


def read_once(
    model: AnyEnsemble, input_ids: Int[Tensor, "1 t"], on_read: Callable[[int], None] = lambda member: None
) -> list[Predictions]:
    """Have every member read one text, as to score it; returns what each predicts behind each of its t tokens.

    Readers that claim are asked by :func:`claims_once`.

    Nothing that is kept of texts is shared, so that several threads may do so at the same time.

    Args:
        model: the ensemble.
        input_ids: (1, t), the text; over bytes a first symbol 256 begins it, and its first byte is predicted, too.
        on_read: called with the number of each member when it has read.

    Raises:
        InvalidInputError: if the text exceeds a member's context, or a member has a template.
        NonFiniteError: if a member's hidden states hold NaN or an infinity.
    """
    model.require_likelihood("scoring a text")
    require_context(model.config, input_ids.shape[1])
    model.contexts.require_no_template()
    tokens, anew = input_ids[0].tolist(), rereads(model)

    def read(i: int) -> Predictions:
        found = _read_once(model, i, tokens, anew=anew)
        on_read(i)
        return found

    found: list[Predictions] = model.each(read, range(len(model.members)))
    return found


def claims_once(model: AnyEnsemble, input_ids: Int[Tensor, "1 t"], given: int | None = None) -> list[Predictions]:
    """Return what each reader that claims tells behind each of a text's t tokens, as :func:`read_once` does of members.

    Args:
        model: the ensemble.
        input_ids: (1, t), the text.
        given: how many of its first tokens were given, not drawn; None for all.
    """
    tokens: list[int] = input_ids[0].tolist()
    _, skipped = model.before_claims(tokens, ())
    symbols, first = tokens[skipped:], None if given is None else max(0, given - skipped)
    places = range(1 - skipped, len(symbols) + 1)
    return [one.read_whole([symbols], [places], given=first) for one in model.claimants]


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


def behind(new: NewTokens) -> Behind:
    """Have members read new tokens: all, or under the gate ``unsure`` those that are asked about a sequence.

    Raises:
        InvalidInputError: if a text exceeds a member's context, own prompts or prefixes do not fit, or each token is to
            be drawn from one member.
    """
    options, model, count = new.options, new.model, len(new.columns)
    if new.is_direct:
        states = model.each(
            lambda i: last_hidden(model.members[i], new.ids, new.kept, **new.shared), range(len(model.members))
        )
        return Behind([own.flatten(0, 1) for own in states], torch.arange(len(new.ids) * count))
    if options.one_member:
        raise InvalidInputError(
            "expected one_member in a call of generate: each token is drawn from one member, and the others have not "
            "read"
        )
    texts, places = new.texts, dict[Dropped, Tensor]()
    numbers = {one: k for k, one in enumerate(texts)}

    def at(one: Dropped, shared: int) -> Tensor:
        """Return which of the predictions of all members are wanted, which end together, wherever they begin."""
        kept, which = new.behind(numbers[one], shared)
        # What follows a text whose context is full is not asked of the rule, unless a recorder counts every position.
        left = which < -1 if one.is_full and options.recorder is None else torch.ones_like(which, dtype=torch.bool)
        places[one] = kept[left] + numbers[one] * count
        return which[left]

    found = read(texts, model.reading, options.settings, every=new.needed > 1, at=at)
    require_read(texts)
    hidden = [torch.cat(own) for own in zip(*found.values(), strict=True)]
    return Behind(hidden, torch.cat(list(places.values())), joined(texts), texts)


def combined_behind(new: NewTokens) -> Float[Tensor, "B k v"]:
    """Return the rule's log-probabilities, in nats, at the kept positions; all tokens alike at those of padding."""
    told, model, options, shape = behind(new), new.model, new.options, (len(new.ids), len(new.columns))
    if not len(told.at):
        nothing = torch.zeros(*shape, model.combiner.v, dtype=torch.float64).log_softmax(-1)
        end_full(told.texts, nothing[:, -1])
        return nothing

    def before() -> TokensBefore | None:
        return TokensBefore.of(new.ids[:, new.kept].flatten()[told.at.to(new.ids.device)], model.tokenizer)

    chunks = model.combiner.combined(
        told.hidden, options.settings, told.asked, before, quickly=options.quickly, proved=False
    )
    ours = options.log_probs(chunks, told.texts)
    if len(ours) < math.prod(shape):
        everywhere = ours.new_full((math.prod(shape), ours.shape[-1]), -math.log(ours.shape[-1]))
        ours = everywhere.index_copy(0, told.at.to(ours.device), ours)
    found = ours.view(*shape, -1)
    end_full(told.texts, found[:, -1])
    return found
