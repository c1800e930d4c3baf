"""From members to the ensemble of tokens, or of bytes, that they make."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError, VocabularyMismatchError
from softmeet.hf.byte_modeling import BYTE_RULE, ByteEnsembleForCausalLM, require_for_bytes
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.members.byte_member import ByteMember
from softmeet.members.covers import Pruning
from softmeet.members.spelling import Spelling, spelling_of
from softmeet.members.vocabulary import CommonVocabulary, common_vocabulary

VOCABULARIES = ("auto", "tokens", "bytes")
_log = logging.getLogger("softmeet")


def require_vocabulary(name: str, prune: float) -> None:
    """Check what an ensemble is combined over, and the share of mass that is followed there.

    Raises:
        InvalidInputError: there is no such vocabulary, or the share is none.
    """
    if not 0 <= prune < 1:
        raise InvalidInputError(f"expected prune to be a share of mass from 0 to below 1, got {prune}")
    if name not in VOCABULARIES:
        raise InvalidInputError(f"expected a vocabulary, {', '.join(VOCABULARIES)}, got {name!r}")


def choose_vocabulary(
    config: EnsembleConfig, tokenizers: Sequence[PreTrainedTokenizerBase], *, any_average: bool = False
) -> CommonVocabulary | list[Spelling]:
    """Decide what members are combined over, before their weights are loaded; a choice of bytes is logged.

    Args:
        config: names the members; where it leaves the vocabulary open (``auto``), it is set.
        tokenizers: the members'.
        any_average: over bytes, set the rule to the average that is the default there.

    Returns:
        What they have in common; or, over bytes, how each of them is read.

    Raises:
        VocabularyMismatchError: the tokenizers differ and tokens were asked for; or one cannot be read over bytes.
        UnsupportedHeadError: over bytes, the rule reads heads.
        InvalidInputError: over bytes, the gate is ``unsure``.
    """
    chosen = config.vocabulary == "auto"
    if config.vocabulary != "bytes":
        try:
            found = common_vocabulary(config.members, tokenizers)
        except VocabularyMismatchError:
            if not chosen:
                raise
        else:
            if config.prefixes is not None:
                raise InvalidInputError(
                    "expected vocabulary='bytes' with prefixes: over tokens, members share every token of a prompt"
                )
            config.vocabulary = "tokens"
            return found
    config.vocabulary = "bytes"
    if any_average:
        config.rule = BYTE_RULE
    require_for_bytes(config.settings)
    pairs = list(zip(config.members, tokenizers, strict=True))
    spellings = [spelling_of(name, own) for name, own in pairs]
    if chosen:
        members = ", ".join(f"{name} ({len(own.get_vocab()):,})" for name, own in pairs)
        _log.warning("combined over bytes, which max_new_tokens counts, as these have different tokens: %s", members)
    return spellings


def assemble(
    config: EnsembleConfig, models: Sequence[PreTrainedModel], vocabulary: CommonVocabulary | Sequence[Spelling]
) -> EnsembleForCausalLM:
    """Make the ensemble of loaded members, in evaluation mode.

    Args:
        config: names them.
        models: the members.
        vocabulary: as :func:`choose_vocabulary` found it.

    Raises:
        UnsupportedHeadError: a member's output layer is not a plain softmax head.
        VocabularyMismatchError: a head has no row for a token.
    """
    if not isinstance(vocabulary, CommonVocabulary):
        pruning = Pruning(config.prune) if config.prune else Pruning(0.0, None)
        prefixes = config.prefixes or [None] * len(models)
        readers = [
            ByteMember(model, spelling, pruning, prefix)
            for model, spelling, prefix in zip(models, vocabulary, prefixes, strict=True)
        ]
        over_bytes: EnsembleForCausalLM = ByteEnsembleForCausalLM(config, readers).eval()
        return over_bytes
    tokenizer = vocabulary.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: EnsembleForCausalLM = EnsembleForCausalLM(config, models).eval()
    model.adopt(tokenizer, vocabulary.ids)
    return model
