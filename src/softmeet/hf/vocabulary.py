"""What an ensemble is combined over: its members' common tokens, or the bytes of a text."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError, UnsupportedHeadError, VocabularyMismatchError
from softmeet.hf.configuration import EnsembleConfig
from softmeet.members.spelling import Spelling, spelling_of
from softmeet.members.vocabulary import CommonVocabulary, common_vocabulary
from softmeet.rules.gates import Unsure, that_closes
from softmeet.rules.registry import all_rules
from softmeet.rules.settings import Settings

VOCABULARIES = ("auto", "tokens", "bytes")
# The rule of ensembles over bytes for which none is named.
BYTE_RULE = "logit-mean"
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


def require_for_bytes(settings: Settings) -> None:
    """Check that a rule and a gate can be used over bytes.

    Raises:
        UnsupportedHeadError: the rule reads heads.
        InvalidInputError: the gate is ``unsure``.
    """
    if isinstance(that_closes(settings.gate), Unsure):
        raise InvalidInputError(
            "the gate 'unsure' is not for byte ensembles, whose members are never behind each other: leave it out"
        )
    rule = settings.rule
    if rule.reads_heads:
        averages = " or ".join(one.name for one in all_rules() if one.is_average)
        raise UnsupportedHeadError(
            f"the rule {rule.name} reads the rows of softmax matrices, and bytes have none: choose {averages}, or "
            "members that share a tokenizer"
        )
