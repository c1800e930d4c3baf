"""``EnsembleForCausalLM``: several causal LMs and a rule, as one causal LM."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.hf.asking import ask
from softmeet.hf.cache import EnsembleCache
from softmeet.hf.calibrated import resolved
from softmeet.hf.combining import Asked, Combining
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.loading import absolute, places
from softmeet.hf.recorder import Recorder
from softmeet.hf.refused import refuse
from softmeet.hf.sampling import RowSampler
from softmeet.hf.saving import Saving
from softmeet.members.heads import head_of, replace_weight
from softmeet.members.huggingface import Dtype, last_hidden, load_members, load_tokenizers
from softmeet.members.placement import Device, each_in_a_thread, whereabouts
from softmeet.members.vocabulary import token_ids, token_support
from softmeet.rules.gates import Gate, Unsure, parse_gate, that_closes
from softmeet.rules.settings import Settings

# Of a text that is evaluated.
_WINDOW = 1024


class EnsembleForCausalLM(Combining, Saving, PreTrainedModel, GenerationMixin):
    """A causal LM whose logits are the log-probabilities, in nats, of a rule over its members.

    Args:
        config: the settings; ``config.members`` names the members.
        members: the models, in the order of the configuration.
        support: (v,), which ids are tokens where heads are padded; None if all are.

    Raises:
        UnsupportedHeadError: a member's output layer is not a plain softmax head.
    """

    config_class = EnsembleConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self, config: EnsembleConfig, members: Sequence[PreTrainedModel], support: Bool[Tensor, " v"] | None = None
    ) -> None:
        self._adopt_limits(config, members)
        super().__init__(config)
        self.members = nn.ModuleList(members)
        self.heads: list[SoftmaxHead] = [head_of(member) for member in members]
        self.capped = any(head.soft_cap is not None for head in self.heads)
        self._banded: tuple[int, list[SoftmaxHead]] | None = None
        self.support = support
        self.tokenizer: PreTrainedTokenizerBase | None = None
        first = members[0].generation_config
        self.generation_config.bos_token_id = first.bos_token_id
        self.generation_config.eos_token_id = first.eos_token_id
        self.generation_config.pad_token_id = first.pad_token_id

    @property
    def window(self) -> int:
        """Tokens that a text is read by at once, unless one says otherwise: the shortest context, 1,024 at most."""
        return min(getattr(self.config, "max_position_embeddings", None) or _WINDOW, _WINDOW)

    @staticmethod
    def _adopt_limits(config: EnsembleConfig, members: Sequence[PreTrainedModel]) -> None:
        configs = [member.config.get_text_config(decoder=True) for member in members]
        config.vocab_size = max(member.get_output_embeddings().weight.shape[0] for member in members)
        limits = [getattr(c, "max_position_embeddings", None) for c in configs]
        known = [limit for limit in limits if limit is not None]
        if known:
            config.max_position_embeddings = min(known)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, key, getattr(configs[0], key, None))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: EnsembleConfig | None = None,
        dtype: Dtype | Sequence[Dtype] = None,
        device_map: Device | Sequence[Device] = None,
        trust_remote_code: bool | None = False,
        **kwargs: Any,
    ) -> EnsembleForCausalLM:
        """Load an ensemble that :meth:`save_pretrained` wrote, with its members.

        Args:
            pretrained_model_name_or_path: a folder or hub id.
            config: in place of the saved one.
            dtype, device_map: one for all members or one each; as ``Ensemble.from_pretrained`` has them. A map may also
                name the members as modules of the ensemble: ``members.0``, ``members.1.lm_head``.
            trust_remote_code: run code that comes with a member.
            kwargs: settings to change, under their names in the configuration, and ``offload_folder``; others of
                transformers' are ignored.

        Raises:
            CheckpointError: a member is missing; the message says where it was expected.
            InvalidInputError: there is no such place or member.
        """
        from softmeet.hf.assembling import assemble, choose_vocabulary  # which knows this class

        folder = kwargs.pop("offload_folder", None)
        if config is None:
            config, kwargs = EnsembleConfig.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
        base = Path(pretrained_model_name_or_path)
        config.members = absolute(config.members, base)
        tokenizers = load_tokenizers(config.members, trust_remote_code=bool(trust_remote_code))
        vocabulary = choose_vocabulary(config, tokenizers)
        members = load_members(
            config.members,
            dtype=dtype,
            device=places(device_map, len(config.members)),
            trust_remote_code=bool(trust_remote_code),
            offload_folder=folder,
        )
        model = assemble(config, members, vocabulary)
        if (base / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(base)
        return model

    def adopt(self, tokenizer: PreTrainedTokenizerBase, ids: frozenset[int] | None = None) -> None:
        """Take the members' common tokenizer.

        Args:
            tokenizer: makes tokens of text.
            ids: the rows of the heads that are tokens of all members; None for all of the tokenizer's.

        Raises:
            VocabularyMismatchError: a head has no row for a token.
        """
        self.tokenizer = tokenizer
        self.support = token_support(ids or token_ids(tokenizer), self.config.members, self.heads)

    def part(self, chosen: Sequence[int], config: EnsembleConfig) -> EnsembleForCausalLM:
        """Make an ensemble of some of the members, which both then share.

        Args:
            chosen: their numbers.
            config: how they are combined.
        """
        part: EnsembleForCausalLM = EnsembleForCausalLM(config, [self.members[k] for k in chosen]).eval()
        if self.tokenizer is not None:
            v = max(head.v for head in self.heads)
            ids = range(v) if self.support is None else self.support.nonzero().squeeze(-1).tolist()
            part.adopt(self.tokenizer, frozenset(ids))
        return part

    def require(self, settings: Settings) -> None:
        """Check that members can be combined by these settings; over bytes not by all."""

    def require_tokens(self, what: str) -> None:
        """Check that members share their tokens, for what needs that; an ensemble over bytes raises here.

        Args:
            what: as the subject of a sentence, such as "evaluation".
        """

    def _apply(self, fn: Any, recurse: bool = True) -> EnsembleForCausalLM:
        """After a move or a cast of the weights, heads are read from where they are now."""
        if any(p.is_meta for p in self.parameters()):
            raise InvalidInputError(
                "expected members whose weights are in memory: those that are offloaded stay where and as they were "
                "loaded; load them anew with device= and dtype="
            )
        super()._apply(fn, recurse)
        self.find_heads_again()
        return self

    def find_heads_again(self) -> None:
        """To be called after members have been moved or cast one by one."""
        self._banded = None
        self.__dict__.pop("apart", None)
        self.heads = [replace_weight(head, member) for head, member in zip(self.heads, self.members, strict=True)]

    def forward(
        self,
        input_ids: Int[Tensor, "B t"] | None = None,
        attention_mask: Int[Tensor, "B s"] | None = None,
        position_ids: Int[Tensor, "B t"] | None = None,
        cache: EnsembleCache | None = None,
        use_cache: bool | None = None,
        labels: Int[Tensor, "B t"] | None = None,
        logits_to_keep: int | Int[Tensor, " k"] = 0,
        recorder: Recorder | None = None,
        row_sampler: RowSampler | None = None,
        settings: Settings | None = None,
        weights: Sequence[float] | None = None,
        gate: str | None = None,
        prefixes: Sequence[Sequence[Sequence[int] | None]] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As any causal LM's; ``logits`` are normalised log-probabilities in nats, fp32.

        Args:
            recorder: receives the solution of every position whose logits are kept.
            settings: how to combine, in place of the configuration's, for this call alone.
            weights: of the pool; the same, where the rest stays as it is.
            gate: the same; ``"none"`` for none.
            prefixes: over bytes, for each row each member's own tokens before it, in place of those before every text;
                None for these.

        Raises:
            NonFiniteError: a member's logits hold NaN or +inf; the message names it.
            InvalidInputError: prefixes over tokens, or not for every row.
        """
        settings = resolved(self, settings or self.with_changes(weights, gate))
        if use_cache and cache is None:
            cache = self.new_cache(settings.gate)
        input_ids = self._checked_length(input_ids, cache)
        shared: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": bool(use_cache),
        }
        if prefixes is not None:
            if not self.over_bytes:
                raise InvalidInputError("expected no prefixes over tokens, where members share every token of a prompt")
            shared["prefixes"] = prefixes
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        closing, asked = that_closes(settings.gate), None
        if isinstance(closing, Unsure) or (cache is not None and cache.lagging):
            unsure = closing if isinstance(closing, Unsure) else None
            hidden, asked = ask(list(self.members), self.heads, self.each, unsure, input_ids, kept, cache, **shared)
        else:
            hidden = self.run(input_ids, cache, kept, **shared)
        log_probs = self._solve(hidden, settings, asked, recorder)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=log_probs, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=log_probs, cache=cache)

    def with_changes(self, weights: Sequence[float] | None, gate: str | Gate | None) -> Settings:
        """The configuration's settings with other weights, or another gate; None leaves either as it is.

        Raises:
            InvalidInputError: as :class:`softmeet.Settings`.
        """
        settings = self.settings if weights is None else self.settings.changed(weights=weights)
        return settings if gate is None else settings.model_copy(update={"gate": parse_gate(gate)})

    def run(
        self,
        input_ids: Int[Tensor, "B t"],
        cache: EnsembleCache | None,
        kept: slice | Int[Tensor, " k"] = slice(None),
        **shared: Any,
    ) -> list[Float[Tensor, "B k _"]]:
        """Every member's last hidden states at those of the new tokens that are kept.

        ``shared`` are options of the members' own forward.
        """
        caches = [None] * len(self.heads) if cache is None else cache.members
        members = self.members
        return self.each(
            lambda i: last_hidden(members[i], input_ids, cache=caches[i], **shared)[:, kept], range(len(members))
        )

    def _checked_length(self, input_ids: Int[Tensor, "B t"] | None, cache: EnsembleCache | None) -> Int[Tensor, "B t"]:
        if input_ids is None:
            raise InvalidInputError(
                "expected input_ids: members share tokens, not embeddings, so inputs_embeds is refused"
            )
        length = input_ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise InvalidInputError(
                f"expected at most {limit} tokens, the shortest member's context, got {length}: shorten the prompt or "
                "lower max_new_tokens"
            )
        return input_ids

    def _prepare_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with what runs past the shortest context cut off, and a warning."""
        generation_config = super()._prepare_generated_length(generation_config, *args, **kwargs)
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and generation_config.max_length > limit:
            warnings.warn(
                f"max_length {generation_config.max_length} is past the shortest member's context: cut to {limit} "
                "tokens",
                stacklevel=4,
            )
            generation_config.max_length = limit
        return generation_config

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As transformers'.

        Raises:
            InvalidInputError: an option that has no meaning for an ensemble, or no such gate; the message says why.
        """
        refuse(generation_config, kwargs)
        weights, gate = kwargs.pop("weights", None), kwargs.pop("gate", None)
        settings = kwargs.pop("settings", None) or self.with_changes(weights, gate)
        # An assistant is given every argument, and knows no settings; without them each token finds the ensemble's own.
        if settings is not self.settings or kwargs.get("assistant_model") is None:
            kwargs["settings"] = resolved(self, settings)
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    def new_cache(self, gate: str | Gate | None = None) -> EnsembleCache:
        """An empty cache: one per member; for the gate ``unsure`` one in which all but the first may be behind."""
        lagging = isinstance(that_closes(parse_gate(gate)), Unsure)
        return EnsembleCache([member.config for member in self.members], lagging=lagging)

    @property
    def device(self) -> torch.device:
        """Where distributions are combined: with the first member's head."""
        return self.heads[0].weight.device

    @cached_property
    def apart(self) -> bool:
        """Whether members are in different places, so that it pays to run them at the same time."""
        return len({whereabouts(member) for member in self.members}) > 1

    def each(self, function: Callable[[int], Any], members: Sequence[int]) -> list[Any]:
        """``function`` of some members' indices; at the same time where they are in different places."""
        return each_in_a_thread(function, members) if self.apart else list(map(function, members))

    def hidden_states(self, input_ids: Int[Tensor, "1 t"]) -> list[Float[Tensor, "t _"]]:
        """Each member's last hidden states over one text, without a cache."""
        self._checked_length(input_ids, None)
        return [states[0] for states in self.run(input_ids, None, use_cache=False)]

    def _solve(
        self,
        hidden: list[Float[Tensor, "B k _"]],
        settings: Settings,
        asked: Asked | None,
        recorder: Recorder | None,
    ) -> Float[Tensor, "B k v"]:
        """Combine every position."""
        parts = []
        if recorder is not None and asked is not None:
            recorder.gate.seconds += asked.seconds
        for log_probs, solution in self.solve_in_chunks(
            [h.flatten(0, 1) for h in hidden], settings, asked, proved=False
        ):
            if recorder is not None:
                recorder.add(solution, log_probs)
            parts.append(solution.log_probs)
        return torch.cat(parts).reshape(*hidden[0].shape[:2], -1)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        given = model_kwargs.get("cache")
        if given is not None and not isinstance(given, EnsembleCache):
            raise InvalidInputError(
                f"expected an EnsembleCache, as model.new_cache() gives, got {type(given).__name__}"
            )
        if generation_config.cache_implementation is not None:
            raise InvalidInputError(
                f"an ensemble keeps one dynamic cache per member; cache_implementation="
                f"{generation_config.cache_implementation!r} is not supported: leave it out"
            )
        if given is None and generation_config.use_cache:
            settings = model_kwargs.get("settings") or self.settings
            model_kwargs["cache"] = self.new_cache(settings.gate)

    def _get_logits_processor(self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """The usual processors, and last the row sampler, if one was given to generate."""
        processors: LogitsProcessorList = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        sampler = (model_kwargs or {}).get("row_sampler")
        if sampler is not None:
            processors.append(sampler)
        return processors
