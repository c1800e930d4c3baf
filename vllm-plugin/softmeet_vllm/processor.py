"""The mixture as vLLM's logits processor, for either of its model runners: which texts are in its batch, and where."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from softmeet.errors import InvalidInputError, SoftmeetError
from softmeet.members.huggingface import load_tokenizers
from softmeet_vllm import start
from softmeet_vllm.asked import Mixed, require_possible
from softmeet_vllm.others import Others, Text

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as _Second
except ImportError:  # a vLLM without a second runner

    class _Second:  # type: ignore[no-redef]
        pass


# After how many steps without it a text's rows are given up, where vLLM does not say that it has ended.
_ABSENT = 64


class Mixture(LogitsProcessor, _Second):
    """Mixes the logits of vLLM's model with those of other models, text by text.

    vLLM makes one of it in each engine, with other arguments in its first and its second model runner. Without
    ``SOFTMEET_MEMBERS`` in the environment it changes nothing.

    Args:
        config: vLLM's configuration.
        where: the device; of the second runner, the state of its requests.
        is_pin_memory: of the first runner alone.
    """

    def __init__(self, config: Any, where: Any, is_pin_memory: bool = False) -> None:
        self._mixed, self._requests = Mixed.of(), where
        # By the place in vLLM's batch (of the second runner, by the slot of the request): the text, and its tokens.
        self._texts = dict[int, tuple[Text, list[int], list[int]]]()
        self._others: Others | None = None
        # Of the second runner, which does not say that a text has ended: in which call each slot was seen last.
        self._calls, self._seen = 0, dict[int, int]()
        if self._mixed.members:
            start.require_engine(config)
            if config.scheduler_config.async_scheduling:
                raise InvalidInputError(
                    "expected vLLM without asynchronous scheduling, which its plugin softmeet switches off: name that "
                    "in VLLM_PLUGINS, too"
                )
            model, scheduler = config.model_config, config.scheduler_config
            (tokenizer,) = load_tokenizers([model.tokenizer])
            self._others = Others(
                self._mixed.members, model.model, tokenizer, model.get_vocab_size(), scheduler.max_num_seqs,
                model.max_model_len,
            )  # fmt: skip

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Raise ValueError, which becomes an answer of 400, if a request asks for what cannot be mixed."""
        mixed = Mixed.of()
        try:
            settings = mixed.settings(params.extra_args)
            if mixed.members:
                require_possible(settings, params, after_penalties=start.second_runner)
        except SoftmeetError as error:
            raise ValueError(str(error)) from error

    def is_argmax_invariant(self) -> bool:
        """Return whether the likeliest token stays so, as where nothing is mixed."""
        return self._others is None

    def _text(self, params: SamplingParams) -> Text:
        bias = {} if start.second_runner else dict(params.logit_bias or {})
        return Text(self._mixed.settings(params.extra_args), bias)

    def _give_up(self, place: int) -> None:
        if self._others is not None and (found := self._texts.pop(place, None)) is not None:
            self._others.close(found[0])

    # The first model runner.

    def update_state(self, update: BatchUpdate | None) -> None:
        """Follow the texts of vLLM's batch: removed ones, then new ones, then those that move."""
        if update is None or self._others is None:
            return
        for place in update.removed:
            self._give_up(place)
        for place, params, prompt, answer in update.added:
            self._give_up(place)
            if prompt is None:
                raise ValueError("expected prompts of token ids, as other models have no use for vLLM's embeddings")
            self._texts[place] = self._text(params), prompt, answer
        for one, other, how in update.moved:
            moved = self._texts.pop(one, None)
            if how is MoveDirectionality.SWAP and other in self._texts:
                self._texts[one] = self._texts.pop(other)
            self._give_up(other)
            if moved is not None:
                self._texts[other] = moved

    # The second model runner.

    def add_request(self, slot: int, params: SamplingParams) -> bool:
        """Begin a text in a slot, and end the one that was there."""
        self._give_up(slot)
        if self._others is None:
            return False
        self._texts[slot] = self._text(params), [], []
        return True

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Return the mixture in place of the logits of vLLM's model.

        Args:
            logits: (rows, v), fp32; changed in place.
            context: of the second runner, which row is which text.
        """
        if self._others is None:
            return logits
        rows, texts, tokens = list[int](), list[Text](), list[list[int]]()
        for row, found, ids in self._first(logits) if context is None else self._second(context):
            rows.append(row)
            texts.append(found)
            tokens.append(ids)
        if rows:
            logits[rows] = self._others.mix(logits[rows], texts, tokens).to(logits.dtype)
        return logits

    def _first(self, logits: Tensor) -> list[tuple[int, Text, list[int]]]:
        found = []
        for place in sorted(place for place in self._texts if place < len(logits)):
            text, prompt, answer = self._texts[place]
            if answer and min(answer[-1:]) < 0:
                raise ValueError("vLLM has not told its newest token: start it with --no-async-scheduling")
            found.append((place, text, [*prompt, *answer]))
        return found

    def _second(self, context: Any) -> list[tuple[int, Text, list[int]]]:
        found, ids = [], self._requests.all_token_ids.gpu
        lengths = (context.pos + 1).tolist()
        for row, (slot, length) in enumerate(zip(context.expanded_idx_mapping.tolist(), lengths, strict=True)):
            if slot in self._texts:
                self._seen[slot] = self._calls
                found.append((row, self._texts[slot][0], ids[slot, :length].tolist()))
        self._calls += 1
        for slot in [slot for slot, seen in self._seen.items() if self._calls - seen > _ABSENT]:
            # Should it come back, it is read anew.
            self._others.close(self._texts[slot][0])  # type: ignore[union-attr]
            del self._seen[slot]
        return found
