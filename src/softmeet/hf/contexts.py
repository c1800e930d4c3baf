"""Members of one model that read texts of their own: their sequences go through the model as rows of one batch.

A *prefix* is what a member alone reads before every text, as ids of tokens; its keys and values are kept. A prompt of
its own takes the place of the whole prompt that the members share, as where its template has something behind the text.
What is generated follows either, token by token, and is the same for all members.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from softmeet.errors import InvalidInputError
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.rows import RowsLayer
from softmeet.members.huggingface import last_hidden, require_cache
from softmeet.members.member import SLOT, Member
from softmeet.members.partial_cache import PartialCache, catch_up, layers_of_keys_and_values, side_by_side
from softmeet.members.prompting import prefix_of

# Free columns behind those in use when keys and values are copied, at least, and as a share of those in use.
_ROOM, _ROOM_SHARE = 32, 4
_LIMIT = "max_position_embeddings"
Ids = Sequence[int]


@dataclass(frozen=True)
class OwnPrompt:
    """What members read of their own in place of a prompt that they share.

    Attributes:
        replaced: how many of the shared tokens that is.
        ids: for each member its own tokens; None for its prefix and the shared ones.
    """

    replaced: int
    ids: Sequence[Ids | None]


class _Growing(DynamicLayer):
    """One layer's keys and values, with room for new tokens, which are written in place.

    Args:
        keys, values: (rows, heads, columns, width), of the columns so far.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._buffers: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values, and return all, as a model does in its forward pass."""
        used = self.keys.shape[2]
        end = used + key_states.shape[2]
        old = bool(self._buffers) and self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if not self._buffers or old or end > self._buffers[0].shape[2]:
            self._buffers = tuple(_with_room(part, end) for part in (self.keys, self.values))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, used:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def shorten(self, by: int) -> None:
        """Remove the last ``by`` columns."""
        kept = self.keys.shape[2] - by
        self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]

    def choose(self, rows: Int[Tensor, " r"]) -> None:
        """Keep copies of the rows with these numbers, in this order; a number may come more than once."""
        own = rows.to(self.keys.device)
        self.keys, self.values, self._buffers = self.keys[own], self.values[own], ()


def _with_room(part: Tensor, columns: int) -> Tensor:
    rows, heads, used, width = part.shape
    found = part.new_empty(rows, heads, columns + max(_ROOM, columns // _ROOM_SHARE), width)
    found[:, :, :used] = part
    return found


class ContextRows(RowsLayer):
    """The cache of the members of one model: for each sequence a row for each member, side by side in one batch.

    All rows end at the same column; shorter ones are padded at the left, so that no real token sees a gap.

    Args:
        count: the number of members, and of rows for each sequence.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.reset()

    def reset(self) -> None:
        """Forget all sequences: the layer is then as before the first token."""
        self._columns = 0
        self._lengths: list[int] = []
        self._cache: Cache | None = None

    def get_seq_length(self) -> int:
        """Count the tokens of the sequences that members share, padding included."""
        return self._columns

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |``tokens_to_remove``| tokens of every row; transformers passes a negative number."""
        by = abs(tokens_to_remove)
        self._columns -= by
        self._lengths = [length - by for length in self._lengths]
        for layer in self._layers:
            layer.shorten(by)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times, its copies side by side."""
        self._choose(torch.arange(len(self._lengths) // self.count).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Int[Tensor, " B"] | Bool[Tensor, " B"]) -> None:
        """Keep the sequences at ``indices``, numbers or a mask, in that order; a number may come more than once."""
        self._choose(torch.arange(len(self._lengths) // self.count)[indices.cpu()])

    reorder_cache = batch_select_indices

    @property
    def _layers(self) -> Iterable[Any]:
        return () if self._cache is None else self._cache.layers

    def _choose(self, sequences: Int[Tensor, " B"]) -> None:
        rows = (sequences[:, None] * self.count + torch.arange(self.count)).flatten()
        self._lengths = [self._lengths[row] for row in rows.tolist()]
        for layer in self._layers:
            layer.choose(rows)

    def run(
        self, model: PreTrainedModel, rows: Sequence[PartialCache], columns: int, *, newest: bool = False
    ) -> Sequence[Float[Tensor, "t d"]]:
        """Run the new tokens of all rows.

        Args:
            model: the members' model, in evaluation mode.
            rows: for each sequence, member by member, its new tokens as ``pending``; of a layer without sequences also
                the keys and values that begin the row.
            columns: the number of columns that the new tokens take in the sequences, padding included.
            newest: whether the states at the newest token of each are enough, as :func:`catch_up` has it.

        Returns:
            for each row the last hidden states at its new tokens, (t, d); an empty list if no row has new tokens.
        """
        self._columns += columns
        even = self._cache is not None and len({len(row.pending) for row in rows}) == 1
        if even and rows[0].pending:
            return self._step(model, torch.tensor([row.pending for row in rows]))
        if self._cache is not None:
            rows = [before.longer(row.pending) for before, row in zip(self.apart(), rows, strict=True)]
        late = [k for k, row in enumerate(rows) if row.pending]
        if not late:
            return []
        done, hidden = catch_up(model, [rows[k] for k in late], newest=newest)
        states = {k: one.states for k, one in zip(late, done, strict=True)}
        found = [states.get(k, row.states) for k, row in enumerate(rows)]
        self._lengths = [own[0][0].shape[2] if own else 0 for own in found]
        self._cache = Cache(layers=[_Growing(one.keys, one.values) for one in side_by_side(found, model).layers])
        spread = dict(zip(late, hidden, strict=True))
        return [spread.get(k, hidden[0][:0]) for k in range(len(rows))]

    def _step(self, model: PreTrainedModel, new: Int[Tensor, "r t"]) -> Sequence[Float[Tensor, "t d"]]:
        """Run equally many new tokens of all rows in one call of the model."""
        lengths, end = torch.tensor(self._lengths)[:, None], max(self._lengths)
        mask = torch.arange(end + new.shape[1]) >= end - lengths
        hidden = last_hidden(
            model, new, cache=self._cache, use_cache=True, attention_mask=mask.long(),
            position_ids=lengths + torch.arange(new.shape[1]),
        )  # fmt: skip
        self._lengths = [length + new.shape[1] for length in self._lengths]
        return list(hidden)

    def apart(self) -> list[PartialCache]:
        """Return each row's keys and values without padding."""
        return [
            PartialCache(
                tuple((one.keys[k : k + 1, :, -length:], one.values[k : k + 1, :, -length:]) for one in self._layers)
                if length
                else ()
            )
            for k, length in enumerate(self._lengths)
        ]


def units(groups: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """Return groups of members' numbers, then each other of n members as a list of its own.

    >>> units([[1, 2]], 4)
    [[1, 2], [0], [3]]
    """
    together = {i for group in groups for i in group}
    return [*map(list, groups), *([i] for i in range(n) if i not in together)]


class Contexts:
    """What each member of an ensemble reads before a text, and which members are one model.

    Args:
        names: the members' names, for messages.
        models: the members' models; some may be the same object.
        prefixes: for each member the ids of what it reads before every text; None for nothing.
        begin: the id of the token that begins a text; a member that has read one does not read another.

    Attributes:
        members: the members' descriptions.
        groups: the numbers of the members of each model.

    Raises:
        InvalidInputError: if a prefix has an id that its member does not know, or its member has a cache of anything
            but keys and values.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[PreTrainedModel],
        prefixes: Sequence[Ids | None] | None = None,
        begin: int | None = None,
    ) -> None:
        self.prefixes = [tuple(own or ()) for own in prefixes or [()] * len(models)]
        self.members, self._models, self._begin = [Member.of(name) for name in names], models, begin
        groups: dict[int, list[int]] = {}
        for i, model in enumerate(models):
            groups.setdefault(id(model), []).append(i)
        self.groups = list(groups.values())
        self._prefixed = [group for group in self.groups if any(self.prefixes[i] for i in group)]
        for name, model, own in zip(names, models, self.prefixes, strict=True):
            known = range(model.get_input_embeddings().weight.shape[0] if own else 0)
            if wrong := [token for token in own if isinstance(token, bool | str) or token not in known]:
                raise InvalidInputError(
                    f"expected a prefix of token ids of {name}, from 0 to {len(known) - 1}, got {wrong[0]!r}"
                )
            if own:
                require_cache(model)
                layers_of_keys_and_values(name, model.config, "its prompt cannot be kept: leave the prompt out")
        self._names = list(names)
        # For each member the keys and values of the beginning of its prefix, and the state of the weights then.
        self._read: dict[int, tuple[Any, PartialCache]] = {}

    @classmethod
    def of(
        cls, config: EnsembleConfig, models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase
    ) -> Contexts:
        """Return the contexts of an ensemble's members: of its configuration's prefixes, else of the members' prompts.

        Args:
            config: the ensemble's configuration.
            models: the members' models.
            tokenizer: the members' common one.
        """
        prompts = [prefix_of(Member.parse(name), tokenizer) for name in config.members]
        return cls(config.members, models, config.prefixes or prompts, tokenizer.bos_token_id)

    def require_no_template(self, i: int | None = None) -> None:
        """Check that member i, or every member, reads texts behind its prompt, so that every token can be predicted.

        Raises:
            InvalidInputError: if a member has a template with something behind the text; the message names it.
        """
        for member in self.members if i is None else self.members[i : i + 1]:
            if member.is_template:
                raise InvalidInputError(
                    f"expected prompts that a text follows, but {member.title} has a template, which is for generation "
                    f"alone: leave out what its prompt has behind {SLOT}"
                )

    def batched(self, own: Sequence[OwnPrompt] | None = None) -> list[list[int]]:
        """Return the groups whose members' rows are batched by :class:`ContextRows`.

        Args:
            own: what members read in place of the call's prompts; None for no prompts of their own.

        Raises:
            InvalidInputError: if a member with a prompt of its own has a cache of anything but keys and values.
        """
        if own is None:
            return self._prefixed
        mine = {i for one in own for i, ids in enumerate(one.ids) if ids is not None}
        for i in mine:
            advice = "it cannot read a prompt of its own: use members that read the same"
            layers_of_keys_and_values(self._names[i], self._models[i].config, advice)
        return [group for group in self.groups if group in self._prefixed or mine.intersection(group)]

    def forget(self) -> None:
        """Forget the keys and values of prefixes, as after the weights have moved or changed."""
        self._read = {}

    def first_row(self, i: int, ids: Ids, own: OwnPrompt | None = None) -> list[int]:
        """Return what member i reads at the beginning of a sequence, as :meth:`before` has it."""
        mine, skipped = self.before(i, ids, own)
        return [*mine, *ids[skipped:]]

    def before(self, i: int, ids: Ids, own: OwnPrompt | None = None) -> tuple[Ids, int]:
        """Return what member i reads of its own at the beginning of a sequence, and in place of how many tokens.

        Args:
            i: the member's number.
            ids: the tokens that members share.
            own: the members' own prompts in place of the first of them; None for none.

        Raises:
            InvalidInputError: if the member has a template, and no prompt of its own.
        """
        mine = None if own is None else own.ids[i]
        if own is not None and mine is not None:
            return mine, own.replaced
        self.require_no_template(i)
        before = self.prefixes[i]
        if not before or list(ids[:1]) != [self._begin]:
            return before, 0
        # The text begins with the prefix now.
        return (*ids[:1], *before[before[:1] == (self._begin,) :]), 1

    def room(self, own: Sequence[Ids | None]) -> int:
        """Return how many tokens fit behind prompts of the members' own; 2³⁰ if nothing limits it.

        Args:
            own: for each member its own prompt, or None; empty for None for all.
        """
        limits = [getattr(model.config.get_text_config(decoder=True), _LIMIT, None) for model in self._models]
        pairs = zip(limits, own, strict=bool(own))
        return min((max(limit - len(ids), 0) for limit, ids in pairs if limit and ids is not None), default=1 << 30)

    def begun(self, i: int, row: Ids, needed: int, stamp: Any) -> PartialCache:
        """Return a sequence of member i with all tokens pending but those of its prefix that are kept.

        Args:
            i: the member's number.
            row: all of its tokens.
            needed: for how many of the last of them hidden states are needed.
            stamp: the :func:`stamp_of` the member's model now.
        """
        then, known = self._read.get(i, (None, PartialCache()))
        shared = _shared(self.prefixes[i], row)
        reused = min(known.run, shared, len(row) - needed)
        if reused <= 0 or stamp != then:
            return PartialCache(pending=tuple(row))
        return known.shorter(known.run - reused).longer(row[reused:])

    def keep(self, i: int, row: Ids, states: PartialCache, stamp: Any) -> None:
        """Keep the keys and values of member i's prefix for later sequences.

        Args:
            i: the member's number.
            row: the tokens of a sequence.
            states: their keys and values.
            stamp: the :func:`stamp_of` the member's model now.
        """
        then, known = self._read.get(i, (None, PartialCache()))
        shared = _shared(self.prefixes[i], row)
        if not shared or (stamp == then and known.run >= shared):
            return
        with torch.inference_mode(False):  # for calls with gradients, too
            cut = tuple(
                (keys[:, :, :shared].detach().clone(), values[:, :, :shared].detach().clone())
                for keys, values in states.states
            )
        if all(bool(part.isfinite().all()) for pair in cut for part in pair):
            self._read[i] = stamp, PartialCache(cut)


def _shared(before: Ids, row: Ids) -> int:
    """Return with how many tokens of a prefix a row begins."""
    return sum(1 for _ in takewhile(bool, map(eq, before, row)))


def stamp_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """Return what changes when a model's weights are changed in place, cast or moved."""
    parameters = list(model.parameters())
    first = parameters[0]
    return first.dtype, first.device, first.data_ptr(), sum(0 if p.is_inference() else p._version for p in parameters)
