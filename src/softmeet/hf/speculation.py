"""Speculation: members read several tokens at once, as one that is ahead of the others drafts what may come.

Every token is the one that decoding one by one gives: the rule's most probable, or the one with the largest sum of the
rule's score and the noise of its position (:mod:`softmeet.hf.sampling`). A draft is drawn from a member's
own distribution with the same noise. Where the rule chooses another token, that token takes the draft's place, and what
members have read behind it is taken back. A draft from q in place of the rule's p is accepted with probability
(1 - TV(p, q)) / (1 + TV(p, q)) at least (Daliri, Musco and Suresh, Coupling without Communication, 2024). That members
draft and read in turn is due to Fu et al., Speculative Ensemble (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from softmeet.errors import InvalidInputError
from softmeet.hf.call_options import CallOptions
from softmeet.hf.refused import checked_length
from softmeet.hf.running import NewTokens
from softmeet.hf.sampling import FreshNoise
from softmeet.hf.turns import Combined, MemberTurns
from softmeet.members.partial_cache import layers_of_keys_and_values
from softmeet.members.quantized import rounds_coarsely
from softmeet.rules.gates import Unsure, that_closes

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble

# Processors of transformers whose scores depend on what they were called with before, which may have been drafts.
_STATEFUL = ("SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor")


# The most sequences that "auto" drafts for: a turn's drafts have to be right in all of them.
_ROWS = 2


def is_to_speculate(
    model: AnyEnsemble,
    options: CallOptions,
    config: Any,
    processors: Sequence[Any],
    cache: Any = None,
    rows: int = 1,
) -> bool:
    """Return whether a call drafts tokens: it is asked to, or does not say, and nothing stands against it.

    Args:
        model: the ensemble that is called.
        options: the call's.
        config: the call's generation configuration.
        processors: the call's processors of scores.
        cache: the call's; None if it is not known yet.
        rows: the number of the call's sequences.

    Raises:
        InvalidInputError: if a number of drafts is asked for, and something stands against it; the message names it.
    """
    asked = options.speculate
    # Members on devices of their own run at the same time, and members that draft in turn.
    cannot_pay = rows > _ROWS or model.apart
    if asked == 0 or (asked in ("auto", None) and cannot_pay) or (asked is None and _is_noticed(model, processors)):
        return False
    against = _against(model, options, config, processors, cache)
    if against and asked not in ("auto", None):
        raise InvalidInputError(
            f"speculate={options.speculate} cannot be used with {', '.join(against)}: leave out one of both"
        )
    return not against


def _is_noticed(model: AnyEnsemble, processors: Sequence[Any]) -> bool:
    """Return whether somebody could notice more of speculation than the time that it takes.

    Texts which should repeat would not where members round coarsely. Processors and functions of the caller's own may
    remember what they were called with.
    """
    ours, given = ("transformers.", "softmeet."), "PrefixConstrainedLogitsProcessor"
    foreign = (not f"{type(one).__module__}.".startswith(ours) or type(one).__name__ == given for one in processors)
    return any(foreign) or any(map(rounds_coarsely, model.members))


def _against(model: AnyEnsemble, options: CallOptions, config: Any, processors: Sequence[Any], cache: Any) -> list[str]:
    """Return what stands against speculation, for messages."""
    found = {
        "a single member": len(model.members) < 2,
        "members over bytes": model.over_bytes,
        "one_member": options.one_member,
        "the gate unsure, by which members already lag behind": isinstance(that_closes(options.settings.gate), Unsure),
        "token_seconds": options.token_seconds is not None,
        "prompts of members' own": options.own_prompts is not None or any(model.contexts.prefixes),
        "use_cache=False": not config.use_cache,
        "num_beams": config.num_beams not in (None, 1),
        "prompt_lookup_num_tokens": getattr(config, "prompt_lookup_num_tokens", None) is not None,
        "use_mtp": bool(getattr(config, "use_mtp", None)),
        "a cache of members that may lag behind": getattr(cache, "lagging", False)
        or getattr(cache, "first_lags", False),
    }
    names = [name for name, given in found.items() if given]
    return [*names, *(type(one).__name__ for one in processors if type(one).__name__ in _STATEFUL)] or _recurrent(model)


def _recurrent(model: AnyEnsemble) -> list[str]:
    """Return the first member whose cache holds more than keys and values, so that tokens cannot be taken back."""
    for i, member in enumerate(model.members):
        try:
            layers_of_keys_and_values("", member.config, "")
        except InvalidInputError:
            return [f"member {i}, whose cache cannot be cut back"]
    return []


@torch.no_grad()
def decode(
    model: AnyEnsemble,
    input_ids: Int[Tensor, "B t"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Generate tokens as transformers' loop of sampling and greedy search does, several at once where drafts are right.

    Args:
        model: the ensemble that is called.
        input_ids: (B, t), the prompts.
        logits_processor, stopping_criteria, generation_config, streamer, model_kwargs: those of the call, as
            transformers' own loop gets them.
        synced_gpus: is False.
    """
    options: CallOptions = model_kwargs["call_options"]
    ids, config = input_ids, generation_config
    noise = FreshNoise() if config.do_sample and options.row_sampler is None else None
    first = model._prefill(ids, config, model_kwargs, is_first_iteration=not config.is_assistant)
    first.cache.activate_past_recording()
    mask = model_kwargs.get("attention_mask")
    mask = ids.new_ones(len(ids), first.cache.get_seq_length()) if mask is None else mask
    positions = model_kwargs.get("position_ids")
    last = mask.long().sum(-1, keepdim=True) - 1 if positions is None else positions[:, -1:]
    text = Drafted(ids, mask, logits_processor, noise, stopping_criteria, config, streamer)
    text.settle(first.logits[:, -1], lambda right: None)
    speculation = Speculation(model, options, text, first.cache, last)
    while not text.finished:
        speculation.turn()
    speculation.take_back()
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return text.settled
    return GenerateDecoderOnlyOutput(sequences=text.settled, scores=text.scores, logits=text.logits, cache=first.cache)


class Drafted:
    """The sequences of a batch: tokens that are settled, and behind them drafts.

    Args:
        ids: (B, t), the prompts.
        mask: (B, s), 1 at tokens and 0 at padding; it may begin before the prompts, with what a cache holds.
        processors: the call's, with its row sampler if it has one.
        noise: to draw tokens by; None to take the one of the largest score.
        stopping, config, streamer: those of the call.

    Attributes:
        ids: (B, T), settled tokens and drafts.
        mask: their attention mask.
        length: the number L of settled columns.
        finished: whether all sequences are.
        scores, logits: of every settled token, if the call asks for them; else None.
    """

    def __init__(
        self,
        ids: Int[Tensor, "B t"],
        mask: Tensor,
        processors: Any,
        noise: FreshNoise | None,
        stopping: Any,
        config: Any,
        streamer: Any,
    ) -> None:
        self.ids, self.mask, self.length = ids, mask, ids.shape[1]
        self._processors, self._noise, self._stopping, self._streamer = processors, noise, stopping, streamer
        self._limit = config.max_length - 1
        self._unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self._hopeful = self._unfinished
        self._pad, self._ends = config._pad_token_tensor, config._eos_token_tensor
        self._padded = any(hasattr(criterion, "eos_token_id") for criterion in stopping)
        asked = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if asked and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if asked and config.output_logits else None
        self.finished = False

    @property
    def settled(self) -> Int[Tensor, "B L"]:
        """Return the settled tokens of each sequence, its prompt included."""
        return self.ids[:, : self.length]

    @property
    def is_open(self) -> bool:
        """Whether another draft may be added: there is room, and a sequence that no draft ends."""
        return self.ids.shape[1] < self._limit and bool(self._hopeful.any())

    def draft(self, log_probs: Float[Tensor, "B v"]) -> bool:
        """Add a draft to each sequence, drawn from log-probabilities in nats behind the last token.

        Returns:
            whether there is one: none where a processor of scores fails, as where a draft has led to a dead end.
        """
        try:
            chosen, _ = self._chosen(self.ids, log_probs, self._hopeful)
        except Exception:  # What is no draft's fault is raised again when the rule is asked.
            return False
        self._append(chosen)
        if self._ends is not None:
            self._hopeful = self._hopeful & ~torch.isin(chosen, self._ends.to(chosen.device))
        return True

    def settle(self, log_probs: Float[Tensor, "B v"], told: Callable[[bool], None]) -> bool:
        """Settle the next token of each sequence by the rule's log-probabilities in nats, as transformers' loop does.

        Args:
            log_probs: (B, v), behind the last settled token.
            told: is called with whether the draft of it was right, if there is one.

        Returns:
            whether drafts behind it remain: it is what was drafted, and there is another to come.
        """
        chosen, scores = self._chosen(self.settled, log_probs, self._unfinished)
        drafted = self.ids.shape[1] > self.length
        right = drafted and bool((self.ids[:, self.length] == chosen).all())
        if drafted:
            told(right)
        if not right:
            self._cut(self.length)
            self._append(chosen)
        self.length += 1
        self._note(log_probs, scores)
        if self._streamer is not None:
            self._streamer.put(chosen.cpu())
        self._unfinished = self._unfinished & ~self._stopping(self.settled, self.scores)
        self.finished = not bool(self._unfinished.any())
        if not right:
            self._hopeful = self._unfinished
        return right and not self.finished

    def _chosen(
        self, ids: Int[Tensor, "B t"], log_probs: Float[Tensor, "B v"], unfinished: Tensor
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, "B v"]]:
        """Return (the token that follows, padding in sequences that are finished; the processed scores)."""
        scores = self._processors(ids, log_probs.to(torch.float32, copy=True).to(ids.device))
        chosen = scores.argmax(-1) if self._noise is None else self._noise.draw(scores, ids.shape[1])
        if self._padded:
            chosen = torch.where(unfinished, chosen, self._pad.to(chosen.device))
        return chosen, scores

    def _note(self, log_probs: Tensor, scores: Tensor) -> None:
        """Keep what the call returns beside the tokens."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (log_probs.float(),)

    def _append(self, chosen: Int[Tensor, " B"]) -> None:
        self.ids = torch.cat([self.ids, chosen[:, None]], -1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], -1)

    def _cut(self, length: int) -> None:
        """Remove all columns from number ``length`` on."""
        if more := self.ids.shape[1] - length:
            self.ids, self.mask = self.ids[:, :length], self.mask[:, : self.mask.shape[1] - more]


class Speculation(MemberTurns):
    """The turns of the members over the sequences of a call of ``generate``.

    Args:
        model: the ensemble that is called.
        options: the call's.
        text: the sequences, of which all but the newest column is in the cache.
        cache: every member's.
        last: (B, 1), the positions of the last columns in the cache.
    """

    def __init__(
        self, model: AnyEnsemble, options: CallOptions, text: Drafted, cache: Any, last: Int[Tensor, "B 1"]
    ) -> None:
        rows, recorded = len(text.ids), options.recorder is not None
        super().__init__(
            model, options.settings, "auto" if options.speculate is None else options.speculate,
            rows=rows, read=text.length - 1, reported=recorded, singly=recorded,
        )  # fmt: skip
        self._text, self._cache, self._recorder = text, cache, options.recorder
        # Column c has position c and these.
        self._before = last - (text.length - 2)

    @property
    def length(self) -> int:
        """The number of columns that are settled."""
        return self._text.length

    def columns(self, start: int, stop: int) -> Int[Tensor, "B k"]:
        """Return the tokens in columns ``start`` to ``stop - 1``."""
        return self._text.ids[:, start:stop]

    @property
    def is_room(self) -> bool:
        """Whether another draft has a place in the text, and in the members' contexts."""
        limit = self._model.config.max_position_embeddings
        return self._text.is_open and (limit is None or self._text.mask.shape[1] < limit)

    def run(self, i: int) -> Float[Tensor, "B t d"]:
        """Run member i over all columns that it has not read."""
        text, model, start = self._text, self._model, self.read[i]
        new = text.ids[:, start:]
        checked_length(model.config, text.mask, None)
        positions = self._before + torch.arange(start, start + new.shape[1], device=new.device)
        shared = {"attention_mask": text.mask, "position_ids": positions, "use_cache": True}
        return NewTokens(model, new, slice(None), self._cache, shared).hidden(i)

    def forget(self, i: int, count: int) -> None:
        """Cut member i's cache by ``count`` columns."""
        self._cache.members[i].crop(-count)

    def draft(self, log_probs: Float[Tensor, "B v"]) -> bool:
        """Add a draft to each sequence."""
        return self._text.draft(log_probs)

    def settle(self, found: Combined) -> bool:
        """Settle the next tokens, and record the positions if that is asked for."""
        if self._recorder is not None and found.solution is not None and found.members is not None:
            self._recorder.add(found.solution, found.members)
        return all(self._text.settle(rows, self.told) for rows in found.ours.split(len(self._text.ids)))
