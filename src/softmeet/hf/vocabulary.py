"""The choice of an ensemble's vocabulary: the tokens that its members share, or the bytes of a text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from numbers import Real

from transformers import PreTrainedTokenizerBase

from softmeet.engine.unread import AVERAGE, averages
from softmeet.errors import InvalidInputError, UnsupportedHeadError, VocabularyMismatchError
from softmeet.hf.configuration import EnsembleConfig
from softmeet.members.member import Member, short
from softmeet.members.spelling import Spelling, spelling_of
from softmeet.members.vocabulary import CommonVocabulary, common_vocabulary, surely_differ
from softmeet.readers.union_form import UnionForm
from softmeet.rules.gates import Safe, unsure_of
from softmeet.rules.settings import Settings

VOCABULARIES = ("auto", "tokens", "bytes", "union")
# Why rules that read heads are refused.
_WHY = {
    "bytes": "reads the rows of softmax matrices, and bytes have none",
    "union": "reads the rows of softmax matrices, and the strings of a union have none",
}
# The default rule over a union: an average of logits has only the strings that all members have.
OVER_UNION = "prob-mean"
_log = logging.getLogger("softmeet")


def require_vocabulary(name: str, prune: float) -> None:
    """Check the two settings of an ensemble's vocabulary.

    Args:
        name: the vocabulary: ``"tokens"``, ``"bytes"``, ``"union"`` or a form of it (:class:`UnionForm`); ``"auto"`` to
            choose by the members' tokenizers.
        prune: over bytes, the share of the probability mass of all tokenizations of a text from which on a member's
            model is run on a tokenization; those of less mass are estimated. 0 to estimate none.

    Raises:
        InvalidInputError: if ``name`` is not one of these, or ``prune`` is not from 0 to below 1.
    """
    if not (isinstance(prune, Real) and 0 <= prune < 1):
        raise InvalidInputError(f"expected prune to be a share of mass from 0 to below 1, got {prune!r}")
    if kind_of(name) == "union":
        UnionForm.parse(name)
    elif name not in VOCABULARIES:
        raise InvalidInputError(f"expected a vocabulary, {', '.join(VOCABULARIES)}, got {name!r}")


def choose_vocabulary(
    config: EnsembleConfig, tokenizers: Sequence[PreTrainedTokenizerBase], *, any_average: bool = False
) -> CommonVocabulary | list[Spelling]:
    """Decide whether an ensemble is over tokens or over bytes, before its members' weights are loaded.

    ``config.vocabulary`` decides. If it is ``"auto"``, the ensemble is over tokens if the tokenizers agree: they have
    the same tokens under the same ids, but for padding and added tokens. Else it is over bytes, which is logged as a
    warning.

    Args:
        config: the ensemble's configuration; its ``vocabulary`` is set to the choice, ``"tokens"`` or ``"bytes"``.
        tokenizers: the members' tokenizers, in the order of ``config.members``.
        any_average: True to set the rule of ``config`` to ``logit-mean``, the default over bytes, if the ensemble is
            over bytes, by choice or as asked for; False to keep its rule.

    Returns:
        Over tokens, the :class:`CommonVocabulary`; over bytes, each member's :class:`Spelling`, its tokens as byte
        strings, in order.

    Raises:
        VocabularyMismatchError: if the tokenizers differ and ``config`` asks for tokens; or, over bytes, if a tokenizer
            is not a fast one, alters texts, or cannot write every byte.
        UnsupportedHeadError: if, over bytes, the rule needs softmax matrices, as ``meet`` does.
    """
    chosen = config.vocabulary == "auto"
    if config.vocabulary in ("auto", "tokens") and not (chosen and surely_differ(tokenizers)):
        try:
            found = common_vocabulary(config.members, tokenizers)
        except VocabularyMismatchError:
            if not chosen:
                raise
        else:
            config.vocabulary = "tokens"
            return found
    config.vocabulary = "bytes" if chosen else config.vocabulary
    require_one_prompt(config)
    if any_average:
        config.rule = OVER_UNION if kind_of(config.vocabulary) == "union" else AVERAGE
    require_for_bytes(config.settings, config.vocabulary)
    pairs = list(zip(config.members, tokenizers, strict=True))
    spellings = [spelling_of(name, own) for name, own in pairs]
    if chosen:
        first, others = short(config.members[0]), ", ".join(map(short, config.members[1:]))
        _log.warning(
            "mixed byte by byte, as %s and %s have different tokens; limits on tokens count those of %s",
            first, others, first,
        )  # fmt: skip
    return spellings


def require_for_bytes(settings: Settings, vocabulary: str = "bytes") -> None:
    """Check that the rule of ``settings`` can be used over bytes, or over a union of tokens.

    Raises:
        UnsupportedHeadError: if the rule needs the members' softmax matrices, which have no rows for bytes.
        InvalidInputError: as :func:`require_gate`.
    """
    rule, kind = settings.rule, kind_of(vocabulary)
    if rule.reads_heads:
        raise UnsupportedHeadError(
            f"the rule {rule.name} {_WHY[kind]}: choose {averages()}, or members that share a tokenizer"
        )
    require_gate(settings, vocabulary)


def require_gate(settings: Settings, vocabulary: str) -> None:
    """Check that the gate of ``settings`` means something over a vocabulary.

    Raises:
        InvalidInputError: if it does not.
    """
    kind = kind_of(vocabulary)
    if kind == "bytes" and isinstance(settings.gate, Safe):
        raise InvalidInputError(
            f"the gate {settings.gate} asks whether members would write tokens across a place, as over bytes they "
            "nearly always do: say vocabulary='union'"
        )
    if kind == "union" and UnionForm.parse(vocabulary).is_joint and unsure_of(settings.gate) is not None:
        raise InvalidInputError(
            f"the gate {settings.gate} lets the first member answer alone, and {vocabulary} is made of what all "
            "members say at a step: leave the gate out, or say vocabulary='union'"
        )


def require_one_prompt(config: EnsembleConfig) -> None:
    """Check that members have no prompts of their own where all of them read the first one's text.

    Raises:
        InvalidInputError: if they have.
    """
    if kind_of(config.vocabulary) != "union" or UnionForm.parse(config.vocabulary).published != "unite":
        return
    if config.prefixes is not None or any(Member.parse(name).prompt is not None for name in config.members):
        raise InvalidInputError(
            "by UniTE's code every member reads the first one's text, so that prompts, prefixes and passages of "
            "members' own mean nothing: leave them out, or say vocabulary='union:k=10'"
        )


def kind_of(vocabulary: str) -> str:
    """Return the name of a vocabulary without its options.

    Example:
        >>> kind_of("union:k=10")
        'union'
    """
    return vocabulary.partition(":")[0]


def require_unicode(*texts: str) -> None:
    """Raise InvalidInputError if a text is none, or holds a surrogate, as one decoded with ``surrogateescape`` does."""
    for text in texts:
        if not isinstance(text, str):
            raise InvalidInputError(f"expected a text, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                f"expected text that UTF-8 can hold, got {text[error.start]!r} at character {error.start}: decode its "
                "bytes by their own encoding"
            ) from None
