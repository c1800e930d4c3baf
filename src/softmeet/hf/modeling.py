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
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.hf import checkpoint
from softmeet.hf.cache import EnsembleCache, Lagging
from softmeet.hf.call_options import CallOptions
from softmeet.hf.cascade import run_others
from softmeet.hf.combining import Combiner, Deferral
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.refused import refuse, refuse_other_caches
from softmeet.hf.vocabulary import require_for_bytes
from softmeet.members.heads import head_of, replace_weight
from softmeet.members.huggingface import Dtype, last_hidden
from softmeet.members.placement import Device, each_in_a_thread, whereabouts
from softmeet.members.reading import Work
from softmeet.members.vocabulary import CommonVocabulary, token_ids, token_support
from softmeet.rules.gates import Gate, Unsure, parse_gate, that_closes
from softmeet.rules.problem import TokensBefore
from softmeet.rules.settings import Settings

# Of a text that is evaluated.
_WINDOW = 1024


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LM whose logits are the log-probabilities, in nats, of a rule over its members.

    This class is the ensemble over tokens that all members share, and the base of other kinds, such as that over bytes.
    A kind is a subclass that overrides all of ``OF_A_KIND``; the rest, from ``forward`` on, serves every kind.

    Args:
        config: the settings; ``config.members`` names the members.
        members: the models, in the order of the configuration; None to build them of their own configurations, with
            random weights, which is what ``AutoModelForCausalLM.from_config`` does.
        support: (v,), which ids are tokens where heads are padded; None if all are.

    Raises:
        UnsupportedHeadError: a member's output layer is not a plain softmax head.
        CheckpointError: without ``members``, a configuration or a tokenizer of theirs cannot be read.
        VocabularyMismatchError: without ``members``, their tokenizers differ.
        InvalidInputError: without ``members``, the configuration is of an ensemble over bytes.
    """

    config_class = EnsembleConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    OF_A_KIND = (
        "over_bytes", "member_heads", "widths", "window", "spent", "work", "part", "find_heads_again", "new_cache",
        "run", "hidden_states", "_get_logits_processor",
    )  # fmt: skip
    over_bytes = False

    def __init__(
        self,
        config: EnsembleConfig,
        members: Sequence[PreTrainedModel] | None = None,
        support: Bool[Tensor, " v"] | None = None,
    ) -> None:
        common = None
        if members is None:
            members, common = checkpoint.random_members(config, over_bytes=False)
        config.adopt_limits(members)
        super().__init__(config)
        self.members = nn.ModuleList(members)
        self.combiner = Combiner(config.members, [head_of(member) for member in members], support)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self.generation_config, key, getattr(members[0].generation_config, key))
        if isinstance(common, CommonVocabulary):
            self.adopt(common.tokenizer, common.ids)

    def forward(
        self,
        input_ids: Int[Tensor, "B t"] | None = None,
        attention_mask: Int[Tensor, "B s"] | None = None,
        position_ids: Int[Tensor, "B t"] | None = None,
        cache: EnsembleCache | None = None,
        use_cache: bool | None = None,
        labels: Int[Tensor, "B t"] | None = None,
        logits_to_keep: int | Int[Tensor, " k"] = 0,
        call_options: CallOptions | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the members on new tokens, as any causal LM, and combine them at the positions to keep.

        Args:
            call_options: what ``generate`` made of its arguments; None to make it of ``kwargs``.
            kwargs: the options that :meth:`CallOptions.of` takes; others of transformers' are ignored.

        Returns:
            ``logits`` (B, k, v), which are normalised log-probabilities in nats, fp32; ``cache`` if it is used; and
            ``loss`` with ``labels``.

        Raises:
            NonFiniteError: a member's logits hold NaN or +inf; the message names it.
            InvalidInputError: prefixes over tokens, or not for every row; or more tokens than the shortest context.
        """
        options = call_options or CallOptions.of(self, kwargs)
        if use_cache and cache is None:
            cache = self.new_cache(options.settings.gate)
        input_ids = self._checked_length(input_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden, deferral = self.run(
            input_ids, cache, kept, options,
            attention_mask=attention_mask, position_ids=position_ids, use_cache=bool(use_cache),
        )  # fmt: skip
        before = TokensBefore.of(input_ids[:, kept].flatten(), self.tokenizer)
        log_probs = self.combiner.combine(hidden, options.settings, deferral, options.recorder, before)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=log_probs, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=log_probs, cache=cache)

    def run(
        self,
        input_ids: Int[Tensor, "B t"],
        cache: EnsembleCache | None,
        kept: slice | Int[Tensor, " k"] = slice(None),
        options: CallOptions | None = None,
        **shared: Any,
    ) -> tuple[list[Float[Tensor, "B k _"]], Deferral | None]:
        """Run the members on new tokens: all of them, or by the gate ``unsure`` the others where the first is unsure.

        Args:
            input_ids: the new tokens.
            cache: of the tokens before them; None if there are none.
            kept: the positions among the new tokens that are to be combined.
            options: of the call; None to run all members.
            shared: options of the members' own forward.

        Returns:
            (each member's last hidden states at the kept positions; the positions at which all members ran, None for
            all).

        Raises:
            InvalidInputError: the gate is ``unsure``, and the cache's members all go together.
        """
        unsure = None if options is None else options.unsure
        members, caches = self.members, [None] * len(self.members) if cache is None else cache.members

        def hidden(i: int) -> Float[Tensor, "B k _"]:
            return last_hidden(members[i], input_ids, cache=caches[i], **shared)[:, kept]

        if unsure is None and not (cache is not None and cache.lagging):
            return self.each(hidden, range(len(members))), None
        if cache is not None and not cache.lagging:
            raise InvalidInputError(
                "expected a cache whose members may be behind, for the gate 'unsure': make it with "
                "new_cache('unsure:…'), or go on with the gate that it was begun with"
            )
        lagging: Any = [Lagging() for _ in members[1:]] if cache is None else caches[1:]
        mask = shared.get("attention_mask")
        return run_others(self.each, list(members), self.heads, lagging, hidden(0), kept, input_ids, mask, unsure)

    def hidden_states(self, input_ids: Int[Tensor, "1 t"]) -> list[Float[Tensor, "t _"]]:
        """Compute each member's last hidden states over one text, without a cache."""
        self._checked_length(input_ids, None)
        return [states[0] for states in self.run(input_ids, None, use_cache=False)[0]]

    def _checked_length(self, input_ids: Int[Tensor, "B t"] | None, cache: EnsembleCache | None) -> Int[Tensor, "B t"]:
        if input_ids is None:
            raise InvalidInputError(
                "expected input_ids: members share tokens, not embeddings, so inputs_embeds is refused"
            )
        length = input_ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        limit = self.config.max_position_embeddings
        if limit is not None and length > limit:
            raise InvalidInputError(
                f"expected at most {limit} tokens, the shortest member's context, got {length}: shorten the prompt or "
                "lower max_new_tokens"
            )
        return input_ids

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as any causal LM of transformers', with the options of :meth:`CallOptions.of` too.

        Raises:
            InvalidInputError: an option that has no meaning for an ensemble, or no such gate; the message says why.
        """
        refuse(generation_config, kwargs)
        kwargs["call_options"] = CallOptions.of(self, kwargs)
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    def _prepare_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Cut off what runs past the shortest context, with a warning."""
        generation_config = super()._prepare_generated_length(generation_config, *args, **kwargs)
        limit = self.config.max_position_embeddings
        if limit is not None and generation_config.max_length > limit:
            past = f"max_length {generation_config.max_length} is past the shortest member's context"
            warnings.warn(f"{past}: cut to {limit} tokens", stacklevel=4)
            generation_config.max_length = limit
        return generation_config

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give the loop a cache of every member, unless it has one or is to go without."""
        refuse_other_caches(generation_config, model_kwargs.get("cache"))
        if model_kwargs.get("cache") is None and generation_config.use_cache:
            model_kwargs["cache"] = self.new_cache(model_kwargs["call_options"].settings.gate)

    def _get_logits_processor(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Put the row sampler, if the call has one, behind the usual processors."""
        processors: LogitsProcessorList = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        sampler = model_kwargs["call_options"].row_sampler
        if sampler is not None:
            processors.append(sampler)
        return processors

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Keep the call's options from an assistant, which knows none or has its own."""
        known = {name: value for name, value in model_kwargs.items() if name != "call_options"}
        return super()._get_candidate_generator(*args, model_kwargs=known, **kwargs)

    def new_cache(self, gate: str | Gate | None = None) -> EnsembleCache:
        """Make an empty cache, one per member; for the gate ``unsure`` one in which all but the first may be behind."""
        lagging = isinstance(that_closes(parse_gate(gate)), Unsure)
        return EnsembleCache([member.config for member in self.members], lagging=lagging)

    @property
    def settings(self) -> Settings:
        """How the members are combined."""
        return self.config.settings  # type: ignore[no-any-return]

    @property
    def heads(self) -> list[SoftmaxHead]:
        """What stands for the members' output layers in a rule."""
        return self.combiner.heads

    @property
    def member_heads(self) -> list[SoftmaxHead]:
        """The members' own output layers."""
        return self.heads

    @property
    def widths(self) -> list[int]:
        """The width of each member's :meth:`hidden_states`."""
        return [head.d for head in self.heads]

    @property
    def window(self) -> int:
        """Tokens that a text is read by at once, unless one says otherwise: the shortest context, 1,024 at most."""
        return min(self.config.max_position_embeddings or _WINDOW, _WINDOW)

    @property
    def spent(self) -> list[Work]:
        """What each member has cost since it was loaded; known over bytes alone."""
        return []

    def work(self, hidden: Float[Tensor, "t _"]) -> Float[Tensor, "_ 3"]:
        """Return what rows of a member's :meth:`hidden_states` cost it, (t, 3); known over bytes alone, else (0, 3)."""
        return hidden.new_zeros(0, 3)

    def require(self, settings: Settings) -> None:
        """Check that members can be combined by some settings: over bytes, as ``vocabulary.require_for_bytes`` does."""
        if self.over_bytes:
            require_for_bytes(settings)

    def require_tokens(self, what: str) -> None:
        """Check that members share their tokens, for what needs that.

        Args:
            what: as the subject of a sentence, such as "evaluation".

        Raises:
            InvalidInputError: the ensemble is over bytes.
        """
        if self.over_bytes:
            raise InvalidInputError(
                f"{what} does not take ensembles over bytes: load members that share a tokenizer, with "
                "vocabulary='tokens'"
            )

    @property
    def device(self) -> torch.device:
        """Where distributions are combined: with the first member's head."""
        return self.combiner.heads[0].weight.device

    @cached_property
    def apart(self) -> bool:
        """Whether members are in different places, so that it pays to run them at the same time."""
        return len({whereabouts(member) for member in self.members}) > 1

    def each(self, function: Callable[[int], Any], members: Sequence[int]) -> list[Any]:
        """Apply a function to some members' numbers, at the same time where they are in different places."""
        return each_in_a_thread(function, members) if self.apart else list(map(function, members))

    def _apply(self, fn: Any, recurse: bool = True) -> EnsembleForCausalLM:
        """Move or cast the weights, and read heads from where they are then."""
        if any(p.is_meta for p in self.parameters()):
            raise InvalidInputError(
                "expected members whose weights are in memory: those that are offloaded stay where and as they were "
                "loaded; load them anew with device= and dtype="
            )
        super()._apply(fn, recurse)
        self.find_heads_again()
        return self

    def find_heads_again(self) -> None:
        """Read the members' output layers where they are, after members have been moved or cast one by one."""
        self.__dict__.pop("apart", None)
        heads = [replace_weight(head, member) for head, member in zip(self.heads, self.members, strict=True)]
        self.combiner = Combiner(self.config.members, heads, self.combiner.support)

    def adopt(self, tokenizer: PreTrainedTokenizerBase, ids: frozenset[int] | None = None) -> None:
        """Take the members' common tokenizer.

        Args:
            tokenizer: makes tokens of text.
            ids: the rows of the heads that are tokens of all members; None for all of the tokenizer's.

        Raises:
            VocabularyMismatchError: a head has no row for a token.
        """
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.combiner.support = token_support(ids or token_ids(tokenizer), self.config.members, self.heads)

    def part(self, chosen: Sequence[int], config: EnsembleConfig) -> EnsembleForCausalLM:
        """Make an ensemble of some of the members, which both then share.

        Args:
            chosen: their numbers.
            config: how they are combined.
        """
        part: EnsembleForCausalLM = EnsembleForCausalLM(config, [self.members[k] for k in chosen]).eval()
        if self.tokenizer is not None:
            v, support = max(head.v for head in self.heads), self.combiner.support
            ids = range(v) if support is None else support.nonzero().squeeze(-1).tolist()
            part.adopt(self.tokenizer, frozenset(ids))
        return part

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
        folder = Path(pretrained_model_name_or_path)
        return checkpoint.load(folder, config, dtype, device_map, bool(trust_remote_code), **kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write a configuration that names the members, a generation configuration, the tokenizer and a card.

        No member's weights are written: local folders are named by their path relative to ``save_directory``.
        """
        checkpoint.save(self, Path(save_directory))
        if push_to_hub:
            self.push_to_hub(**kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the ensemble, as transformers does it, where its members are on the hub.

        Raises:
            InvalidInputError: a member is a local folder, which nobody else could load.
        """
        local = [name for name in self.config.members if Path(name).exists()]
        if local:
            raise InvalidInputError(
                f"expected members on the hub, got local folders {local}: push them first, then build the ensemble "
                "from their hub ids"
            )
        return super().push_to_hub(*args, **kwargs)
