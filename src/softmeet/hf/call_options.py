"""``CallOptions``: softmeet's own options of one call of an ensemble, as one object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessorList

from softmeet.engine.combine import Combined
from softmeet.engine.continuation import Continuation
from softmeet.engine.masking import Structured, mask_of
from softmeet.engine.processors import SomethingLeft
from softmeet.engine.recorder import Recorder
from softmeet.errors import InvalidInputError
from softmeet.hf.contexts import OwnPrompt
from softmeet.hf.sampling import RowSampler
from softmeet.rules.gates import Unsure, that_closes, unsure_of
from softmeet.rules.pools import ProbMean
from softmeet.rules.settings import Settings
from softmeet.solvers.clock import time_limit
from softmeet.structured.structure import Structure

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble

_NOTHING_ALLOWED = (
    "nothing is left that the structure allows, as another option forbids it: lower min_new_tokens, or leave out "
    "suppress_tokens and bad_words_ids"
)
# The options behind some of transformers' processors of scores, for messages.
_OPTIONS = {
    "TemperatureLogitsWarper": "temperature", "TopKLogitsWarper": "top_k", "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p", "TypicalLogitsWarper": "typical_p", "EpsilonLogitsWarper": "epsilon_cutoff",
    "EtaLogitsWarper": "eta_cutoff", "RepetitionPenaltyLogitsProcessor": "repetition_penalty",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size", "MinLengthLogitsProcessor": "min_length",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens", "NoBadWordsLogitsProcessor": "bad_words_ids",
    "SequenceBiasLogitsProcessor": "sequence_bias", "SuppressTokensLogitsProcessor": "suppress_tokens",
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn",
}  # fmt: skip
# For each sequence or prompt, each member's own token ids before it; None for the member's default prefix.
Prefixes = Sequence[Sequence[Sequence[int] | None]]


def _refuse_beside_one_member(named: Sequence[str]) -> None:
    """Raise InvalidInputError if options are named that need the probability mean itself."""
    if named:
        raise InvalidInputError(
            f"one_member draws each token from one member alone, by prob-mean, and cannot be used with "
            f"{', '.join(named)}: leave out one of both"
        )


def _before(prefixes: Prefixes, model: AnyEnsemble) -> list[OwnPrompt]:
    """Return what members read before each prompt.

    Raises:
        InvalidInputError: unless each entry of ``prefixes`` has token ids or None for every member, and these are no
            symbols.
    """
    n = len(model.members)
    if model.begin is None:
        why = "where each member's own come with its name or when it is loaded" if model.cuts_alone else ""
        raise InvalidInputError(
            f"expected no prefixes for a call, {why or 'as over tokens members share every token of a prompt'}"
        )
    for own in prefixes if _is_list(prefixes) else [prefixes]:
        if not _is_list(own) or len(own) != n or not all(one is None or _is_list(one) for one in own):
            raise InvalidInputError(
                f"expected prefixes as a list for each prompt, with token ids or None for each of {n} members, got "
                f"{own!r}"
            )
    return [OwnPrompt(0, own) for own in prefixes]


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


def checked_drafts(speculate: Any) -> int | Literal["auto"] | None:
    """Return ``speculate`` as it is, or raise InvalidInputError if it is no "auto", None or number from 0 to 64."""
    if speculate is None or speculate == "auto" or (type(speculate) is int and 0 <= speculate <= 64):
        return speculate  # type: ignore[no-any-return]
    raise InvalidInputError(f"expected speculate as a number of tokens from 0 to 64 or 'auto', got {speculate!r}")


@dataclass(frozen=True, eq=False)
class CallOptions:
    """softmeet's own options of one call of ``generate``, or of a ``forward`` outside of it.

    ``generate`` makes the object once, and transformers' loop passes it to every ``forward``.

    Attributes:
        settings: the settings by which the members are combined; without the gate ``auto`` where it cannot close.
        recorder: counts the solution of every position whose logits are kept; None for no record.
        row_sampler: draws each sequence's tokens with noise of its own; None to let transformers draw them.
        own_prompts: what members read in place of the beginning of each sequence (or of each prompt, if every prompt
            has the same number of sequences); None for nothing of their own.
        token_seconds: the seconds that solvers may take in one ``forward``, for the next token of all sequences, as
            :func:`softmeet.time_limit` has it; None for no limit.
        structure: what each new text has to be, as a :class:`softmeet.Structure`; None for anything.
        one_member: whether each token is drawn from one member, which is drawn by its weight: the probability mean's
            distribution at about the price of one member.
        speculate: how many tokens the cheapest member, files or what the text repeats draft before members read them;
            "auto" for as many as pay, and none where nothing does; 0 for none; None for "auto" where nobody could
            notice anything but the time (:func:`softmeet.hf.decoding.is_to_speculate`), and none elsewhere.
        given: how many of the first tokens of texts that begin were given to readers that claim, not drawn; None for
            all that are read first.
    """

    settings: Settings
    recorder: Recorder | None = None
    row_sampler: RowSampler | None = None
    own_prompts: Sequence[OwnPrompt] | None = None
    token_seconds: float | None = None
    structure: Structure | None = None
    one_member: bool = False
    speculate: int | Literal["auto"] | None = None
    given: int | None = None

    def __post_init__(self) -> None:
        """Check that ``one_member`` stands beside nothing that needs the mean itself."""
        if not self.one_member:
            return
        own, settings = self, self.settings
        found = {
            f"the rule {settings.rule}": not isinstance(settings.rule, ProbMean),
            "a gate": that_closes(settings.gate) is not None,
            "rule_temperature": settings.rule_temperature != 1,
            "a recorder or report": own.recorder is not None,
            "a seed": own.row_sampler is not None,
            "structure": own.structure is not None,
        }
        _refuse_beside_one_member([name for name, given in found.items() if given])

    @classmethod
    def of(cls, model: AnyEnsemble, given: dict[str, Any]) -> CallOptions:
        """Remove softmeet's own options from a call's keyword arguments, and return them, checked.

        Args:
            model: the ensemble that is called.
            given: the keyword arguments, changed in place. Removed are ``settings``, ``recorder``, ``row_sampler``,
                ``prefixes``, ``own_prompts``, ``token_seconds``, ``structure``, ``speculate``, ``one_member``,
                ``given``, ``weights`` and ``gate``.
                ``prefixes[k][i]``, where members' own tokens are no symbols, are the ids of
                those that member i reads before sequence or prompt k; None for the member's default. Without
                ``settings`` the model's own hold, with the pool's ``weights`` and the ``gate`` (a text such as
                ``"unsure:0.5"``, ``"none"`` for none) replaced by those given; with ``settings``, which come from
                :meth:`Settings.for_members`, ``weights`` and ``gate`` are ignored.

        Raises:
            InvalidInputError: if the weights, the gate, the structure or ``token_seconds`` are not valid, or prefixes
                are given over tokens.
            UnsupportedHeadError: if the ensemble is over bytes, and the rule needs softmax matrices, as ``meet`` does.
        """
        settings, weights, gate = (given.pop(name, None) for name in ("settings", "weights", "gate"))
        if settings is None:
            changes = {"weights": weights, "gate": gate}
            settings = model.settings.changed(**{name: x for name, x in changes.items() if x is not None})
        model.require(settings)
        names = ("recorder", "row_sampler", "own_prompts", "token_seconds", "structure", "given")
        own = {name: given.pop(name, None) for name in names} | {"one_member": bool(given.pop("one_member", False))}
        own["speculate"] = checked_drafts(given.pop("speculate", None))
        if given.pop("max_bytes", None) is not None:
            raise InvalidInputError("max_bytes is for members combined over bytes: over tokens say max_new_tokens")
        if (prefixes := given.pop("prefixes", None)) is not None:
            own["own_prompts"] = _before(prefixes, model)
        if own["one_member"] and model.combiner.joint:
            _refuse_beside_one_member([f"vocabulary={model.config.vocabulary!r}, which all members make together"])
        seconds = own["token_seconds"]
        if seconds is not None and not (isinstance(seconds, int | float) and seconds >= 0):
            raise InvalidInputError(f"expected token_seconds as a number from 0, got {seconds!r}")
        if not isinstance(own["structure"], Structure | None):
            raise InvalidInputError(
                f"expected structure as softmeet.Structure.json_schema(…), regex, choice or grammar make it, got "
                f"{type(own['structure']).__name__}"
            )
        return cls(model.combiner.resolved(settings), **own)

    def around(
        self, processors: LogitsProcessorList, model: AnyEnsemble, config: Any, prompt_length: int
    ) -> LogitsProcessorList:
        """Return a call's processors of scores: the structure's, transformers' own, and the row sampler.

        Args:
            processors: transformers' own.
            model: the ensemble that is called.
            config: the call's generation configuration.
            prompt_length: the number of tokens, padding included, of each prompt.

        Raises:
            InvalidInputError: if the structure cannot be used with the ensemble's tokens.
        """
        last = [] if self.row_sampler is None else [self.row_sampler]
        if self.one_member:
            self._require_plain(config, processors)
        if self.structure is None:
            return LogitsProcessorList([*processors, *last])
        mask = mask_of(self.structure, model, config)
        return LogitsProcessorList(
            [Structured(mask, prompt_length), *processors, SomethingLeft(_NOTHING_ALLOWED), *last]
        )

    def _require_plain(self, config: Any, processors: LogitsProcessorList) -> None:
        """Check that tokens are drawn from the mean as it is, without anything that changes or ranks probabilities."""
        found = {
            "greedy search (do_sample=False)": not config.do_sample,
            "num_beams": config.num_beams not in (None, 1),
            "output_scores": config.output_scores,
            "output_logits": config.output_logits,
            "use_cache=False": not config.use_cache,
        }
        named = [name for name, given in found.items() if given]
        _refuse_beside_one_member(named + [_OPTIONS.get(type(one).__name__, type(one).__name__) for one in processors])

    def longest(self, model: AnyEnsemble, wanted: int, prompt_length: int) -> int:
        """Return how long sequences get: as long as wanted, or as own prompts leave room in a member's context.

        Args:
            model: the ensemble that is called.
            wanted: the number of tokens asked for, those of the prompt included.
            prompt_length: the number of tokens, padding included, of each prompt.
        """
        rooms = [model.contexts.room(own.ids) for own in self.own_prompts or () if own.replaced]
        return min([wanted, *(prompt_length + room for room in rooms)])

    @cached_property
    def unsure(self) -> Unsure | None:
        """The gate ``unsure``, by which members after the first need not always run; None without one."""
        return unsure_of(self.settings.gate)

    @property
    def quickly(self) -> bool:
        """Whether an average may be computed without being solved for."""
        return self.recorder is None or not self.recorder.needs_solutions

    def log_probs(self, chunks: Iterable[Combined], texts: Sequence[Continuation] = ()) -> Float[Tensor, "B v"]:
        """Return the rule's log-probabilities in nats, computed in the call's time and counted by its recorder.

        Args:
            chunks: what the rule makes of B places.
            texts: those of which that is.
        """
        found, recorder = list[Tensor](), self.recorder
        if recorder is not None:
            recorder.gate.seconds += sum(one.spent for one in texts)
        with nullcontext() if self.token_seconds is None else time_limit(self.token_seconds):
            for chunk in chunks:
                if recorder is not None:
                    chunk.tell(recorder)
                found.append(chunk.ours)
        return torch.cat(found)
