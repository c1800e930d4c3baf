"""Decoding of a call of ``generate``: sampling and greedy search, token by token or several at once by speculation.

Every token is the one that transformers' own loop would choose: the rule's most probable, or the one with the largest
sum of the rule's score and the noise of its position (:mod:`softmeet.engine.draw`). A draft is drawn from a member's
own distribution with the same noise. Where the rule chooses another token, that token takes the draft's place, and what
members have read behind it is taken back. A draft from q in place of the rule's p is accepted with probability
(1 - TV(p, q)) / (1 + TV(p, q)) at least (Daliri, Musco and Suresh, Coupling without Communication, 2024). That members
draft and read in turn is due to Fu et al., Speculative Ensemble (2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from softmeet.engine.ask import Hidden
from softmeet.engine.combine import Combined, weights_of
from softmeet.engine.continuation import Dropped
from softmeet.engine.draw import Draw, Noise, choose
from softmeet.engine.speculate import MemberTurns, by_kept_costs
from softmeet.engine.step import combined, end_full, of_one_each, read, require_read
from softmeet.errors import InvalidInputError
from softmeet.hf.call_options import CallOptions
from softmeet.hf.refused import checked_length, require_context
from softmeet.hf.running import NewTokens
from softmeet.members.quantized import rounds_coarsely
from softmeet.members.trunk import CACHE

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
    rows: int = 1,
) -> bool:
    """Return whether a call drafts tokens: it is asked to, or does not say, and nothing stands against it.

    Args:
        model: the ensemble that is called.
        options: the call's.
        config: the call's generation configuration.
        processors: the call's processors of scores.
        rows: the number of the call's sequences.

    Raises:
        InvalidInputError: if a number of drafts is asked for, and something stands against it; the message names it.
    """
    asked = options.speculate
    # Members on devices of their own run at the same time, and those of one model in one call, but drafts in turn.
    cannot_pay = rows > _ROWS or model.apart or len({*map(id, model.members)}) < len(model.members)
    # A draft of less than a token, such as a byte, saves nearly nothing.
    is_left = asked is None and (model.symbols_of_token > 1 or _is_noticed(model, options, processors))
    if asked == 0 or is_left or (asked in ("auto", None) and cannot_pay):
        return False
    against = _against(model, options, config, processors)
    if against and asked not in ("auto", None):
        raise InvalidInputError(
            f"speculate={options.speculate} cannot be used with {', '.join(against)}: leave out one of both"
        )
    return not against


def _is_noticed(model: AnyEnsemble, options: CallOptions, processors: Sequence[Any]) -> bool:
    """Return whether somebody could notice more of speculation than the time that it takes.

    Texts which should repeat would not where members round coarsely and drafts are paced by a clock. Processors and
    functions of the caller's own may remember what they were called with.
    """
    ours, given = ("transformers.", "softmeet."), "PrefixConstrainedLogitsProcessor"
    foreign = (not f"{type(one).__module__}.".startswith(ours) or type(one).__name__ == given for one in processors)
    coarse = any(map(rounds_coarsely, model.members))
    return any(foreign) or (coarse and not by_kept_costs(model.readers_of_members, options.settings))


def _against(model: AnyEnsemble, options: CallOptions, config: Any, processors: Sequence[Any]) -> list[str]:
    """Return what stands against speculation, for messages."""
    found = {
        "one_member": options.one_member,
        f"vocabulary={model.config.vocabulary!r}, which all members make together": model.combiner.joint,
        "the gate unsure, by which members already lag behind": options.unsure is not None,
        "token_seconds": options.token_seconds is not None,
        "use_cache=False": not config.use_cache,
        "num_beams": config.num_beams not in (None, 1),
        "prompt_lookup_num_tokens": getattr(config, "prompt_lookup_num_tokens", None) is not None,
        "use_mtp": bool(getattr(config, "use_mtp", None)),
    }
    names = [name for name, given in found.items() if given]
    names += [type(one).__name__ for one in processors if type(one).__name__ in _STATEFUL]
    readers = [] if names else [*model.readers_of_members, *model.claimants]
    fixed = [i for i, one in enumerate(readers) if not one.traits.can_crop]
    return names or [f"member {i}, whose cache cannot be cut back" for i in fixed]


def decodes(config: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether :func:`decode` does what transformers' loop of sampling and greedy search would do.

    Not where processes wait for each other, and for an assistant that drafts for another loop.
    """
    return not kwargs.get("synced_gpus") and not config.is_assistant


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
    """Generate tokens as transformers' loop of sampling and greedy search does, by the engine.

    That draws in less time than torch.multinomial (``benchmarks/decode.py draws``), and torch's generator in one state
    gives one text, whether tokens are drafted or not, and members keep what they have read or not.

    Args:
        model: the ensemble that is called.
        input_ids: (B, t), the prompts.
        logits_processor, stopping_criteria, generation_config, streamer, model_kwargs: those of the call, as
            transformers' own loop gets them.
        synced_gpus: is False.
    """
    config, cache = generation_config, model_kwargs.get(CACHE)
    unseeded = config.do_sample and model_kwargs["call_options"].row_sampler is None
    noise = Noise.unseeded(len(input_ids)) if unseeded else None
    written = Written(input_ids, logits_processor, noise, stopping_criteria, config, streamer)
    if cache is None:
        _reread(model, written, model_kwargs)
    else:
        _read_on(model, written, logits_processor, config, model_kwargs)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return written.ids
    kept = {"sequences": written.ids, "scores": written.scores, "logits": written.logits, CACHE: cache}
    return GenerateDecoderOnlyOutput(**kept)


def _reread(model: AnyEnsemble, written: Written, given: dict[str, Any]) -> None:
    """Choose tokens where members keep nothing of what they have read, and so read each text from its beginning."""
    while not written.finished:
        found = model(**model.prepare_inputs_for_generation(written.ids, **given))
        given = model._update_model_kwargs_for_generation(found, given)
        written.settle(found.logits[:, -1])


def _read_on(
    model: AnyEnsemble, written: Written, processors: LogitsProcessorList, config: Any, given: dict[str, Any]
) -> None:
    """Choose tokens where members keep what they have read in a cache."""
    options, cache, before = given["call_options"], given[CACHE], written.ids
    known = cache.columns, [len(one.tokens) for one in cache.texts]
    shared = {"attention_mask": given.get("attention_mask"), "position_ids": given.get("position_ids")}
    mask, width = shared["attention_mask"], getattr(config, "_mask_length", -1)
    # A call that goes on from a cache has all tokens, or new ones alone with a mask of all, as transformers has it.
    whole = before.shape[1] == (width if mask is None else mask.shape[1])
    new = checked_length(model.config, before[:, cache.columns * whole :], cache)
    try:
        texts = NewTokens(model, new, slice(-1, None), cache, options, shared).texts
        starts = [len(one.tokens) for one in texts]
        steps = Steps(model, options, texts, written)
        steps.take()
        ahead = None
        if is_to_speculate(model, options, config, processors, len(texts)) and not written.finished:
            ahead = Drafting(model, options, steps)
        while not written.finished:
            if ahead is None or ahead.is_over:
                steps.take()
            else:
                ahead.go_on()
    except BaseException:
        cache.take_back(*known)
        raise
    if ahead is not None:
        ahead.end()
    more = written.ids.shape[1] - before.shape[1]
    for one, start in zip(texts, starts, strict=True):
        # The newest token counts as not read; behind its end a sequence has padding.
        one.tokens += [written.padding] * (start + more - len(one.tokens))
        del one.tokens[-1:]
    cache.columns += more - 1


class Written:
    """The sequences of a call of ``generate`` as transformers' loop has them, and how their tokens are chosen.

    Args:
        ids: (B, t), the prompts.
        processors: the call's, with its row sampler if it has one.
        noise: to draw tokens by; None to take the one of the largest score.
        stopping, config, streamer: those of the call.

    Attributes:
        ids: (B, T), the sequences so far.
        limit: the most columns.
        unfinished: (B,), which of them go on.
        finished: whether none does.
        ends: the ids that end a sequence.
        padding: the id behind a sequence's end.
        scores, logits: of every token, if the call asks for them; else None.
    """

    def __init__(
        self,
        ids: Int[Tensor, "B t"],
        processors: Any,
        noise: Noise | None,
        stopping: Any,
        config: Any,
        streamer: Any,
    ) -> None:
        self.ids, self.limit = ids, config.max_length
        self._draw, self._stopping, self._streamer = Draw(processors, noise), stopping, streamer
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.finished = False
        pad, ends = config._pad_token_tensor, config._eos_token_tensor
        self.padding, self.ends = 0 if pad is None else int(pad), [] if ends is None else ends.tolist()
        self._padded = any(hasattr(criterion, "eos_token_id") for criterion in stopping)
        asked = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if asked and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if asked and config.output_logits else None

    def settle(self, log_probs: Float[Tensor, "B v"]) -> list[int]:
        """Choose the next token of each sequence by the rule's log-probabilities in nats, and return the tokens."""
        chosen, scores = self.chosen(self.ids, log_probs, self.unfinished)
        self.ids = torch.cat([self.ids, chosen[:, None]], -1)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (log_probs.float(),)
        if self._streamer is not None:
            self._streamer.put(chosen.cpu())
        self.unfinished = self.unfinished & ~self._stopping(self.ids, self.scores)
        self.finished = not bool(self.unfinished.any())
        return chosen.tolist()

    def chosen(
        self, ids: Int[Tensor, "B T"], log_probs: Float[Tensor, "B v"], unfinished: Bool[Tensor, " B"]
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, "B v"]]:
        """Return (the token that follows, padding in sequences that are finished; the processed scores)."""
        scores = self._draw.scores(ids, log_probs.to(torch.float32, copy=True).to(ids.device))
        chosen = choose(scores, self._draw.noise(ids.shape[1]))
        if self._padded:
            chosen = torch.where(unfinished, chosen, torch.full_like(chosen, self.padding))
        return chosen, scores


class Steps:
    """The steps of a call: each reads the newest token of every sequence that goes on, and chooses the next.

    Args:
        model: the ensemble that is called.
        options: the call's.
        texts: what members have read of each sequence.
        written: the sequences.
    """

    def __init__(self, model: AnyEnsemble, options: CallOptions, texts: Sequence[Dropped], written: Written) -> None:
        self._model, self._options, self.texts, self.written = model, options, texts, written
        # Of a cache that goes on there may be more tokens than the sequences begin with.
        self._before = max(len(one.tokens) for one in texts) - written.ids.shape[1]

    @property
    def live(self) -> list[int]:
        """The numbers of the sequences that go on."""
        return self.written.unfinished.nonzero().flatten().tolist()

    def take(self) -> None:
        """Read the newest token of every sequence that goes on, and choose the next."""
        live = self.live
        require_context(self._model.config, self._before + self.written.ids.shape[1])
        texts = self.texts if len(live) == len(self.texts) else [self.texts[k] for k in live]
        if self._options.recorder is not None:
            self._options.recorder.coming = list(live)
        self.settle(live, self._ours(texts))

    def settle(self, live: Sequence[int], ours: Float[Tensor, "b v"]) -> None:
        """Choose the next token of some sequences by log-probabilities in nats."""
        chosen = self.written.settle(ours if len(live) == len(self.texts) else self.spread(live, ours))
        for k in live:
            self.texts[k].tokens.append(chosen[k])

    def spread(self, live: Sequence[int], ours: Float[Tensor, "b v"]) -> Float[Tensor, "B v"]:
        """Return a row for every sequence, zeros for those that are finished."""
        if len(live) == len(self.texts):
            return ours
        return ours.new_zeros(len(self.texts), ours.shape[-1]).index_copy(
            0, torch.tensor(live, device=ours.device), ours
        )

    def _ours(self, texts: Sequence[Dropped]) -> Float[Tensor, "b v"]:
        """Return the rule's log-probabilities, in nats, behind the newest token of texts."""
        options, members, settings = self._options, self._model.reading, self._options.settings
        if options.one_member:
            weights = torch.tensor(weights_of(settings), dtype=torch.float64)
            drawn = torch.multinomial(weights, len(texts), replacement=True)
            ours = of_one_each(texts, drawn.tolist(), members, lambda: float(torch.rand(())))
            end_full(texts, ours)
        else:
            hidden = [*read(texts, members, settings).values()]
            require_read(texts)
            for one in texts:
                if one.is_full:
                    return self._with_ends(texts, hidden)
            ours = options.log_probs(combined(texts, hidden, settings, quickly=options.quickly), texts)
        return ours

    def _with_ends(self, texts: Sequence[Dropped], hidden: Sequence[Hidden]) -> Float[Tensor, "b v"]:
        """Return what follows texts of which some have to end, as a member's context is full: of these their end."""
        options = self._options
        # A recorder counts every position.
        going = [k for k, one in enumerate(texts) if options.recorder is not None or not one.is_full]
        ours = torch.zeros(len(texts), self._model.combiner.v, dtype=torch.float64, device=self._model.device)
        if going:
            on = [texts[k] for k in going]
            chunks = combined(on, [hidden[k] for k in going], options.settings, quickly=options.quickly)
            told = options.log_probs(chunks, on)
            ours = ours.to(told.dtype).index_copy(0, torch.tensor(going, device=ours.device), told)
        end_full(texts, ours)
        return ours


class Drafting(MemberTurns):
    """The turns of the members over the sequences of a call of ``generate``.

    Args:
        model: the ensemble that is called.
        options: the call's.
        steps: the call's, of which the first was taken.
    """

    def __init__(self, model: AnyEnsemble, options: CallOptions, steps: Steps) -> None:
        self._live, self._steps, self._options = steps.live, steps, options
        recorded, speculate = options.recorder is not None, options.speculate
        super().__init__(
            [steps.texts[k] for k in self._live], model.reading, options.settings,
            "auto" if speculate is None else speculate, reported=recorded, singly=recorded,
        )  # fmt: skip
        self._limit = model.config.max_position_embeddings

    def go_on(self) -> None:
        """Let the member that has read the least read on, draft its share, and settle what can be."""
        self.turn()
        if (live := self._steps.live) != self._live:
            # Nothing is left of the others' drafts, either.
            self._live, self.texts = live, [self._steps.texts[k] for k in live]

    @property
    def _hopeful(self) -> list[bool]:
        """Which sequences no draft ends."""
        ends = self._steps.written.ends
        return [not set(one.drafts).intersection(ends) for one in self.texts]

    @property
    def is_room(self) -> bool:
        """Whether another draft has a place: there is room, and a sequence that no draft ends."""
        columns = self._steps.written.ids.shape[1] + len(self.texts[0].drafts)
        fits = columns < self._steps.written.limit - 1 and (self._limit is None or columns < self._limit)
        return fits and any(self._hopeful)

    def draft(self, log_probs: Float[Tensor, "b v"]) -> bool:
        """Add a draft to each sequence, drawn from log-probabilities in nats behind the last token.

        Returns:
            whether there is one: none where a processor of scores fails, as where a draft has led to a dead end.
        """
        written, live, count = self._steps.written, self._live, len(self.texts[0].drafts)
        ahead, hopeful = [[written.padding] * count for _ in written.ids], [False] * len(written.ids)
        for k, one, own in zip(live, self.texts, self._hopeful, strict=True):
            ahead[k], hopeful[k] = one.drafts, own
        ids = torch.cat([written.ids, written.ids.new_tensor(ahead)], -1) if count else written.ids
        try:
            chosen, _ = written.chosen(ids, self._steps.spread(live, log_probs), ids.new_tensor(hopeful).bool())
        except Exception:  # What is no draft's fault is raised again when the rule is asked.
            return False
        for k, one in zip(live, self.texts, strict=True):
            one.drafts.append(int(chosen[k]))
        return True

    def take(self, found: Combined, rows: slice) -> bool:
        """Choose the next token of each sequence, and record its place; return whether all go on."""
        recorder = self._options.recorder
        if recorder is not None:
            recorder.coming = list(self._live)
            found.tell(recorder)  # of this place alone
        self._steps.settle(self._live, found.ours[rows])
        return self._steps.live == self._live
