"""``EnsembleForCausalLM``: several causal LMs, combined by a rule, as one causal LM of transformers."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from softmeet.engine.combine import Combiner
from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead
from softmeet.hf import checkpoint
from softmeet.hf.cache import EnsembleCache
from softmeet.hf.call_options import CallOptions
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.contexts import Contexts, OwnPrompt
from softmeet.hf.decoding import decode, decodes, is_to_speculate
from softmeet.hf.readers import ReadMembers
from softmeet.hf.refused import checked_length, refuse, refuse_other_caches
from softmeet.hf.running import NewTokens, claims_once, combined_behind, read_once
from softmeet.hf.unread import require_all, require_known
from softmeet.members.heads import head_of, replace_weight
from softmeet.members.huggingface import Dtype
from softmeet.members.opaque import Head
from softmeet.members.placement import Device, each_in_a_thread, whereabouts
from softmeet.members.trunk import CACHE
from softmeet.members.vocabulary import CommonVocabulary, token_ids, token_support
from softmeet.readers.reader import Reader, Row, Work
from softmeet.rules.gates import Gate, parse_gate
from softmeet.rules.settings import Settings

# The most tokens that evaluation reads at once by default.
_WINDOW = 1024


class EnsembleForCausalLM(ReadMembers, PreTrainedModel, GenerationMixin):
    """A causal LM whose logits are the log-probabilities, in nats, that a rule computes from its members' predictions.

    This class combines members over the tokens that they share. It is the base class of other kinds of ensemble, such
    as those over bytes: a subclass overrides every name in ``OF_A_KIND``; the other methods serve every kind.

    Args:
        config: the settings; ``config.members`` names the members.
        members: the models, in the order of ``config.members``; None to build each from its own configuration, with
            random weights, as ``AutoModelForCausalLM.from_config`` does.
        support: (v,) bool, True for the ids that are tokens, for heads with padding rows; None if all ids are tokens.
        heads: the members' output layers, by ``id`` of the model; None to find them.

    Raises:
        UnsupportedHeadError: if the rule reads heads, and a member's cannot be read.
        CheckpointError: if ``members`` is None and a member's configuration or tokenizer cannot be read.
        VocabularyMismatchError: if ``members`` is None and the members' tokenizers differ.
        InvalidInputError: if ``members`` is None and ``config`` describes an ensemble over bytes.
    """

    config_class = EnsembleConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    OF_A_KIND = (
        "over_bytes", "begin", "symbols_of_token", "limit_of_symbols", "member_heads", "room", "window", "spent",
        "pruning", "own_tokens", "part", "find_heads_again", "key_of", "new_reader", "before",
        "before_claims", "require", "require_tokens", "generate", "_get_logits_processor",
    )  # fmt: skip
    over_bytes, symbols_of_token = False, 1  # About how many symbols, written one by one, a token has.
    limit_of_symbols = "max_new_tokens"  # The option of ``generate`` that limits how many symbols are written.
    cuts_alone = False  # Whether each member reads prompts as its own tokenizer cuts them, before any symbol.
    # The symbol that a text may begin with, behind members' own tokens; None where these are symbols themselves.
    begin: int | None = None

    def __init__(
        self,
        config: EnsembleConfig,
        members: Sequence[PreTrainedModel] | None = None,
        support: Bool[Tensor, " v"] | None = None,
        heads: dict[int, Head] | None = None,
    ) -> None:
        common = None
        if members is None:
            members, common = checkpoint.random_members(config, over_bytes=False)
        own = [head_of(member) if heads is None else heads[id(member)] for member in members]
        config.adopt_limits(members, max(head.v for head in own))
        super().__init__(config)
        self.members = nn.ModuleList(members)
        self.combiner = Combiner(config.members, own, support)
        self.require(config.settings)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.garbage = deque[tuple[Reader, Row]]()
        self.contexts = Contexts(config.members, list(members))
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
        """Run the members on new tokens and combine their predictions; the arguments are those of any causal LM.

        Args:
            logits_to_keep: combine at the last k positions alone (0: at all), or at the positions with these k indices.
            call_options: the options of a call of ``generate``; None to read them from ``kwargs``.
            kwargs: ``settings``, ``weights`` of the pool, ``gate``, ``recorder``, ``token_seconds``, over bytes
                ``prefixes``, each member's token ids before each row, and beside files ``given``, how many of the first
                tokens were given, not drawn (all). All others are ignored.

        Returns:
            ``logits`` (B, k, v): normalised log-probabilities in nats, fp32 or fp64; ``cache``, as given or made;
            ``loss``, the mean cross-entropy of ``labels`` in nats, if there are labels.

        Raises:
            NonFiniteError: if a member's logits hold NaN or +inf; the message names the member.
            InvalidInputError: if an option is not valid, or ``input_ids`` is None or exceeds the shortest context.
        """
        options = call_options or CallOptions.of(self, kwargs)
        cache = kwargs.get("past_key_values") if cache is None else cache
        if use_cache and cache is None:
            cache = self.new_cache()
        input_ids = checked_length(self.config, input_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        shared = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": bool(use_cache)}
        log_probs = combined_behind(NewTokens(self, input_ids, kept, cache, options, shared))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=log_probs, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=log_probs, **{CACHE: cache})

    def hidden_states(self, input_ids: Int[Tensor, "1 t"], given: int | None = None) -> list[Float[Tensor, "t _"]]:
        """Run the members over one text, and return each one's last hidden states, (t, d_i), row k after token k.

        Members over bytes have none: these are log-probabilities, (t, 257), of the text's first byte too behind a 256.
        Behind them are the states of readers that claim, to which the first ``given`` tokens were given (None: all).
        """
        return [one.states() for one in (*read_once(self, input_ids), *claims_once(self, input_ids, given))]

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate tokens as transformers' ``generate`` does.

        Args:
            kwargs: may also hold ``settings``, ``weights`` of the pool, ``gate``, ``recorder``, ``row_sampler``,
                ``structure``, ``token_seconds``, ``one_member``, ``speculate`` and, over bytes, ``prefixes``: each
                member's token ids before prompts.

        Raises:
            InvalidInputError: if an option has no meaning for an ensemble (:func:`refuse`), or a value is not valid.
        """
        refuse(generation_config, kwargs)
        kwargs["call_options"] = CallOptions.of(self, kwargs)
        found = super().generate(inputs, generation_config=generation_config, **kwargs)
        self.close_dropped()
        return found

    def _prepare_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Lower ``max_length`` to the shortest member's context, with a warning, if it is larger."""
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
        """Put a new ensemble cache into ``model_kwargs``, unless there is one or ``use_cache`` is off."""
        refuse_other_caches(generation_config, model_kwargs.get(CACHE))
        if self.claimants and not generation_config.use_cache:
            raise InvalidInputError(f"expected use_cache=True beside {self.claimants[0].name}: leave it out")
        # What an earlier call has drawn was given to this one.
        for one in model_kwargs[CACHE].texts if model_kwargs.get(CACHE) is not None else ():
            one.begin_claims()
        if model_kwargs.get(CACHE) is None and generation_config.use_cache:
            model_kwargs[CACHE] = self.new_cache()

    def _get_logits_processor(self, generation_config: Any, input_ids_seq_length: int, **kwargs: Any) -> Any:
        """Put the call's structure before transformers' own processors, its row sampler after, and bound its length."""
        found = super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)
        options: CallOptions = kwargs["model_kwargs"]["call_options"]
        generation_config.max_length = options.longest(self, generation_config.max_length, input_ids_seq_length)
        is_to_speculate(self, options, generation_config, found)  # which refuses what other loops do not know
        return options.around(found, self, generation_config, input_ids_seq_length)

    def _sample(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Choose tokens by the engine where :func:`decodes` says so, elsewhere by transformers' own loop."""
        if decodes(kwargs["generation_config"], kwargs):
            return decode(self, input_ids, **kwargs)
        return super()._sample(input_ids, **kwargs)

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Leave the call's options out of an assistant model's arguments: it has none, or options of its own."""
        known = {name: value for name, value in model_kwargs.items() if name != "call_options"}
        return super()._get_candidate_generator(*args, model_kwargs=known, **kwargs)

    def new_cache(self, gate: str | Gate | None = None) -> EnsembleCache:
        """Make an empty cache of all members, for any call; ``gate`` is checked, and makes no difference.

        Raises:
            InvalidInputError: if there is no such gate, or a member takes no cache.
        """
        parse_gate(gate)
        return EnsembleCache([*self.readers_of_members, *self.claimants])

    @property
    def settings(self) -> Settings:
        """The settings by which the members are combined: ``config.settings``, completed for these members."""
        return self.config.settings  # type: ignore[no-any-return]

    @property
    def heads(self) -> list[SoftmaxHead]:
        """The heads that the rule is given: output layers; a column of zeros for one that cannot be read, or bytes."""
        return self.combiner.given

    @property
    def member_heads(self) -> list[Head]:
        """The members' own output layers, in order, whether they can be read or not."""
        return self.combiner.heads

    def room(self, length: int) -> int | None:
        """Return how many tokens may be written behind a prompt of ``length`` symbols; None for any number."""
        return None if self.config.max_position_embeddings is None else self.config.max_position_embeddings - length

    @property
    def window(self) -> int:
        """The tokens that evaluation reads at once by default: the shortest member's context, but at most 1,024."""
        return min(self.config.max_position_embeddings or _WINDOW, _WINDOW)

    @property
    def spent(self) -> list[Work]:
        """Each member's :class:`Work` (model calls, tokens run) since it was loaded; over tokens an empty list."""
        return []

    @property
    def pruning(self) -> dict[str, float]:
        """How much of a text's readings members leave out, ``prune`` by name; over tokens nothing."""
        return {}

    def before(self, i: int, prompt: Sequence[int], own: Sequence[Sequence[int] | None]) -> tuple[Sequence[int], int]:
        """Return what member i reads of its own at the beginning of a text, and in place of how many of its tokens.

        Args:
            i: the member's number.
            prompt: the text's first tokens, which members share.
            own: for each member what it reads in place of these, over bytes before them; empty, or None, for nothing.
        """
        return self.contexts.before(i, prompt, OwnPrompt(len(prompt), tuple(own)) if own else None)

    def require(self, settings: Settings) -> None:
        """Raise the error of a rule or setting that these members cannot be combined by (:meth:`Combiner.require`)."""
        self.combiner.require(settings)
        require_known(settings, self.config.members, self.members)

    def require_tokens(self, what: str) -> None:
        """Raise InvalidInputError if the ensemble is over bytes; the message names ``what``, such as "evaluation"."""

    def own_prompt(self, text: str, *, special: bool) -> list[list[int] | None]:
        """Return for each member the tokens of its own as which it reads a prompt; None where it reads shared ones."""
        return [None] * len(self.members)

    def require_likelihood(self, what: str) -> None:
        """Raise InvalidInputError if a text has no one likelihood; the message names ``what`` needs it."""
        require_all(what, self.config.members, self.members)

    @property
    def device(self) -> torch.device:
        """The device on which distributions are combined: that of the first member's head."""
        return self.combiner.heads[0].device

    @cached_property
    def apart(self) -> bool:
        """Whether members are on different devices, so that it pays to run them at the same time."""
        return len({whereabouts(member) for member in self.members}) > 1

    def each(self, function: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
        """Return [function(part) for part in parts], members or readers; in threads if members are :attr:`apart`."""
        return each_in_a_thread(function, parts) if self.apart else list(map(function, parts))

    def _apply(self, fn: Any, recurse: bool = True) -> EnsembleForCausalLM:
        """Move or cast the weights by ``fn``, and make the heads from the new weights."""
        if any(p.is_meta for p in self.parameters()):
            raise InvalidInputError(
                "expected members whose weights are in memory: those that are offloaded stay where and as they were "
                "loaded; load them anew with device= and dtype="
            )
        super()._apply(fn, recurse)
        self.find_heads_again()
        return self

    def find_heads_again(self) -> None:
        """Take the heads anew from the members' weights; call it after single members were moved or cast."""
        self.forget_readers()
        heads = [replace_weight(head, member) for head, member in zip(self.member_heads, self.members, strict=True)]
        self.combiner = Combiner(self.config.members, heads, self.combiner.support)

    def adopt(self, tokenizer: PreTrainedTokenizerBase, ids: frozenset[int] | None = None) -> None:
        """Set the tokenizer that the members share, with it the ids that can have a probability, and what prompts are.

        Args:
            tokenizer: the tokenizer; if it has no padding token, it gets its end-of-text token as one.
            ids: the ids that are the same token for all members; None for all of the tokenizer's.

        Raises:
            VocabularyMismatchError: if a member's head has no logit for one of the ids.
        """
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.forget_readers()
        self.contexts = Contexts.of(self.config, list(self.members), tokenizer)
        self.config.adopt_limits(list(self.members), self.combiner.v, self.contexts.prefixes)
        self.combiner.support = token_support(ids or token_ids(tokenizer), self.config.members, self.heads)

    def part(self, chosen: Sequence[int], config: EnsembleConfig) -> EnsembleForCausalLM:
        """Make an ensemble of members ``chosen``, numbers from 0, which shares their weights; ``config`` names them.

        A number may come more than once, as for members that differ by prompt.
        """
        heads = {id(member): head for member, head in zip(self.members, self.member_heads, strict=True)}
        members = [self.members[k] for k in chosen]
        part: EnsembleForCausalLM = EnsembleForCausalLM(config, members, heads=heads).eval()
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
            config: replaces the saved configuration.
            dtype: None for fp32 on the CPU and the checkpoints' own elsewhere; one for all members or one each.
            device_map: a device (None: the CPU), ``"auto"``, or a dict by module, such as ``members.1.lm_head``; or
                one of these for each member.
            trust_remote_code: whether code that comes with a member may run.
            kwargs: settings in place of the saved ones, by name, and ``offload_folder``; all others are ignored.

        Raises:
            CheckpointError: if a member is missing; the message says where it was expected.
            InvalidInputError: if a device is unknown, or ``device_map`` names a member that does not exist.
            VocabularyMismatchError: if the members' tokenizers do not fit the saved vocabulary, tokens or bytes.
        """
        how = Path(pretrained_model_name_or_path), config, dtype, device_map, bool(trust_remote_code)
        return checkpoint.load(EnsembleForCausalLM, *how, **kwargs)  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configurations, tokenizer and a model card into a folder, but no weights: members are named."""
        checkpoint.save(self, Path(save_directory))
        if push_to_hub:
            self.push_to_hub(**kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the ensemble as transformers' ``push_to_hub`` does; all of its members have to be on the hub.

        Raises:
            InvalidInputError: if a member is a local folder, which nobody else could load.
        """
        checkpoint.require_on_hub(self.config)
        return super().push_to_hub(*args, **kwargs)
