"""Speculation: members read several tokens at once, as one that is ahead of the others drafts what may come.

Every token is the one that decoding one by one gives: the rule's most probable, or the one with the largest sum of the
rule's score and the noise of its position (:mod:`softmeet.hf.sampling`). A draft is drawn from a member's
own distribution with the same noise. Where the rule chooses another token, that token takes the draft's place, and what
members have read behind it is taken back. A draft from q in place of the rule's p is accepted with probability
(1 - TV(p, q)) / (1 + TV(p, q)) at least (Daliri, Musco and Suresh, Coupling without Communication, 2024). That members
draft and read in turn is due to Fu et al., Speculative Ensemble (2025).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from softmeet.errors import InvalidInputError
from softmeet.hf import quick
from softmeet.hf.pace import MOST, Pace
from softmeet.hf.running import NewTokens
from softmeet.hf.sampling import FreshSampler
from softmeet.members.partial_cache import layers_of_keys_and_values
from softmeet.rules.gates import Unsure, that_closes
from softmeet.rules.problem import TokensBefore

if TYPE_CHECKING:
    from softmeet.hf.call_options import CallOptions
    from softmeet.hf.modeling import EnsembleForCausalLM


def is_to_speculate(model: EnsembleForCausalLM, options: CallOptions, config: Any) -> bool:
    """Return whether a call drafts tokens: it is asked to, and nothing stands against it.

    Args:
        model: the ensemble that is called.
        options: the call's.
        config: the call's generation configuration.

    Raises:
        InvalidInputError: if a number of drafts is asked for, and something stands against it; the message names it.
    """
    if not options.speculate:
        return False
    against = _against(model, options, config)
    if against and options.speculate != "auto":
        raise InvalidInputError(
            f"speculate={options.speculate} cannot be used with {', '.join(against)}: leave out one of both"
        )
    return not against


def _against(model: EnsembleForCausalLM, options: CallOptions, config: Any) -> list[str]:
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
    }
    return [name for name, given in found.items() if given] or _recurrent(model)


def _recurrent(model: EnsembleForCausalLM) -> list[str]:
    """Return the first member whose cache holds more than keys and values, so that tokens cannot be taken back."""
    for i, member in enumerate(model.members):
        try:
            layers_of_keys_and_values("", member.config, "")
        except InvalidInputError:
            return [f"member {i}, whose cache cannot be cut back"]
    return []


@torch.no_grad()
def decode(
    model: EnsembleForCausalLM,
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
        logits_processor, stopping_criteria, generation_config, streamer, synced_gpus, model_kwargs: those of the call,
            as transformers' own loop gets them.
    """
    options: CallOptions = model_kwargs["call_options"]
    ids, config, processors = input_ids, generation_config, logits_processor
    if config.do_sample and options.row_sampler is None:
        processors = LogitsProcessorList([*processors, FreshSampler()])
    model_kwargs["cache"].activate_past_recording()
    first = model._prefill(ids, config, model_kwargs, is_first_iteration=not config.is_assistant)
    mask = model_kwargs.get("attention_mask")
    mask = ids.new_ones(len(ids), first.cache.get_seq_length()) if mask is None else mask
    text = Drafted(ids, mask, processors, stopping_criteria, config, streamer)
    text.settle(first.logits[:, -1], None)
    speculation = Speculation(model, options, text, first.cache)
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
        processors, stopping, config, streamer: those of the call.

    Attributes:
        ids: (B, T), settled tokens and drafts.
        mask: their attention mask.
        length: the number L of settled columns.
        finished: whether all sequences are.
        authors: for each draft the number of the member that it is from.
        scores, logits: of every settled token, if the call asks for them; else None.
    """

    def __init__(
        self, ids: Int[Tensor, "B t"], mask: Tensor, processors: Any, stopping: Any, config: Any, streamer: Any
    ) -> None:
        self.ids, self.mask, self.length = ids, mask, ids.shape[1]
        self._processors, self._stopping, self._streamer = processors, stopping, streamer
        self._limit = config.max_length
        self._unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self._hopeful = self._unfinished
        self._pad = config._pad_token_tensor
        self._ends = config._eos_token_tensor
        asked = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if asked and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if asked and config.output_logits else None
        self.authors: list[int] = []
        self.finished = False

    @property
    def settled(self) -> Int[Tensor, "B L"]:
        """The settled tokens."""
        return self.ids[:, : self.length]

    @property
    def is_open(self) -> bool:
        """Whether another draft may be added: there is room, and a sequence that no draft ends."""
        return self.ids.shape[1] < self._limit - 1 and bool(self._hopeful.any())

    def draft(self, log_probs: Float[Tensor, "B v"], author: int) -> None:
        """Add a draft to each sequence, drawn from a member's log-probabilities in nats behind the last token."""
        chosen, _ = self._chosen(self.ids, log_probs, self._hopeful)
        self._append(chosen)
        self.authors.append(author)
        if self._ends is not None:
            self._hopeful = self._hopeful & ~torch.isin(chosen, self._ends.to(chosen.device))

    def settle(self, log_probs: Float[Tensor, "B v"], pace: Pace | None) -> bool:
        """Settle the next token of each sequence by the rule's log-probabilities in nats, as transformers' loop does.

        Returns:
            whether drafts behind it remain: it is what was drafted, and there is another to come.
        """
        chosen, scores = self._chosen(self.settled, log_probs, self._unfinished)
        drafted = self.ids.shape[1] > self.length
        right = drafted and bool((self.ids[:, self.length] == chosen).all())
        if drafted and pace is not None:
            pace.shares[self.authors[0]].add(right)
        self.authors = self.authors[1:] if right else []
        if not right:
            self._cut(self.length)
            self._append(chosen)
        for processor in self._processors:
            if isinstance(processor, FreshSampler):
                processor.forget(self.length)
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
        chosen = scores.argmax(-1)
        if self._ends is not None:
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


class Speculation:
    """The turns of the members: each reads all that it has not read, and drafts what comes next.

    Args:
        model: the ensemble that is called.
        options: the call's.
        text: the sequences, of which all but the newest column is in the cache.
        cache: every member's.
    """

    def __init__(self, model: EnsembleForCausalLM, options: CallOptions, text: Drafted, cache: Any) -> None:
        self._model, self._options, self._text, self._cache = model, options, text, cache
        n, v = len(model.members), model.combiner.v
        sizes = [sum(p.numel() * p.element_size() for p in member.parameters()) for member in model.members]
        weights = quick.weights_of(options.settings)
        # Of members of about one size, the one that weighs most is the nearest to the rule.
        self._order = sorted(range(n), key=lambda i: (sizes[i] > 1.1 * min(sizes), -weights[i], sizes[i]))
        self._pace = Pace(n, self._order[0], len(text.ids))
        settings = options.settings
        average = settings.rule.is_average and options.recorder is None
        self._quick = average and quick.may(settings, len(text.ids) * (2 * n + MOST), v)
        self._read = [text.length - 1] * n
        self._hidden: list[list[Tensor]] = [[] for _ in range(n)]
        self._logits: list[list[Tensor]] = [[] for _ in range(n)]

    def turn(self) -> None:
        """Let the member that has read the least read on; it then drafts what is its share."""
        text = self._text
        i = min(self._order, key=self._read.__getitem__)
        count = self._drafts(i)
        for k in range(max(count, 1)):
            self._read_on(i)
            if not self._settle() or k == count or not text.is_open:
                return
            self._draft(i)

    def _drafts(self, i: int) -> int:
        """Return how many tokens member i drafts at its turn: the cheapest as many as pay, each other one token."""
        if i == self._order[0]:
            asked = self._options.speculate
            self._count = self._pace.choose() if asked == "auto" else int(asked)
        return self._count if i == self._order[0] else min(self._count, 1)

    def _read_on(self, i: int) -> None:
        """Run member i over all columns that it has not read."""
        text, model = self._text, self._model
        begun, start = time.perf_counter(), self._read[i]
        new = text.ids[:, start:]
        positions = (text.mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
        shared = {"attention_mask": text.mask, "position_ids": positions, "use_cache": True}
        states = NewTokens(model, new, slice(None), self._cache, shared).hidden(i)
        head = model.member_heads[i]
        compute = quick.native_logits(head, states.flatten(0, 1)) if self._quick else head.logits(states.flatten(0, 1))
        logits = nn.functional.pad(compute.to(model.device), (0, model.combiner.v - head.v), value=-torch.inf)
        self._hidden[i] += states.unbind(1)
        self._logits[i] += logits.unflatten(0, states.shape[:2]).unbind(1)
        self._read[i] = text.ids.shape[1]
        self._pace.calls[i].add(new.shape[1], time.perf_counter() - begun)

    def _draft(self, i: int) -> None:
        """Draft the next token from member i's own distribution, with the rule's temperature."""
        begun = time.perf_counter()
        logits, support = self._logits[i][-1] / self._options.settings.rule_temperature, self._model.combiner.support
        logits = logits if support is None else logits.masked_fill(~support, -torch.inf)
        self._text.draft(logits.log_softmax(-1), i)
        self._pace.drafting.add(1, time.perf_counter() - begun)

    def _settle(self) -> bool:
        """Settle the tokens behind every column that all members have read; returns whether drafts remain."""
        text = self._text
        count = min(self._read) - (text.length - 1)
        at_once = 1 if self._options.recorder is not None else max(count, 1)
        for start in range(0, count, at_once):
            begun = time.perf_counter()
            found = self._log_probs(start, start + at_once)
            self._pace.rule.add(at_once, time.perf_counter() - begun)
            for log_probs in found:
                if not text.settle(log_probs, self._pace):
                    self.take_back()
                    return False
        for known in (*self._hidden, *self._logits):
            del known[:count]
        return True

    def _log_probs(self, start: int, stop: int) -> Sequence[Float[Tensor, "B v"]]:
        """Return the rule's log-probabilities behind columns start to stop - 1 of those that are not settled."""
        model, options, text = self._model, self._options, self._text
        settings, combiner = options.settings, model.combiner
        logits = [torch.cat(own[start:stop]) for own in self._logits]
        found = quick.average(logits, settings, combiner.support, combiner.v) if self._quick else None
        if found is None:
            newest = text.length - 1
            columns = text.ids[:, newest : newest + stop - start]
            before = TokensBefore.of(columns.T.flatten(), model.tokenizer)
            hidden = [torch.cat(own[start:stop]) for own in self._hidden]
            log_probs, solution = combiner.solve_rows(
                hidden, settings, before=before, proved=False, logits=torch.stack(logits)
            )
            if options.recorder is not None:
                options.recorder.add(solution, log_probs)
            found = solution.log_probs
        rows: Sequence[Tensor] = found.split(len(text.ids))
        return rows

    def take_back(self) -> None:
        """Make every member forget the columns behind those that are settled, and the newest of these."""
        kept = self._text.length - 1
        for i, read in enumerate(self._read):
            self._cache.members[i].crop(kept - read)
        self._read = [kept] * len(self._read)
        for known in (*self._hidden, *self._logits):
            known.clear()
