"""Whether members share a vocabulary, and which rows of their heads are tokens of all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.errors import VocabularyMismatchError
from softmeet.heads import SoftmaxHead

_SHOWN = 5
# As converters to GGUF name rows of a head that stand for nothing.
_PADDING = re.compile(r"\[PAD\d+\]")


@dataclass(frozen=True, eq=False)
class CommonVocabulary:
    """What members' tokenizers have in common.

    Attributes:
        tokenizer: one of the members' that makes of a text only tokens that all have: the first's, if it does.
        ids: those that are the same token for every member.
    """

    tokenizer: PreTrainedTokenizerBase
    ids: frozenset[int]


def common_vocabulary(names: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase]) -> CommonVocabulary:
    """Find the tokens that all members have under one id.

    Vocabularies may differ in padding, and in tokens that were added to them, as those of a model and of its variant
    for chat do. All others have to be the same, and so have those that end a text.

    Args:
        names: of the members, for the message.
        tokenizers: theirs.

    Raises:
        VocabularyMismatchError: they are not; the message says which tokens differ.
    """
    every = [_by_id(tokenizer) for tokenizer in tokenizers]
    added = [set(tokenizer.added_tokens_decoder) for tokenizer in tokenizers]
    ordinary = [{i: word for i, word in own.items() if i not in new} for own, new in zip(every, added, strict=True)]
    for k, own in enumerate(every):
        # One of two may have added what the other always had.
        if not (ordinary[0].items() <= own.items() and ordinary[k].items() <= every[0].items()):
            raise _mismatch(names, tokenizers, k)
    ids = frozenset(i for i, word in every[0].items() if all(own.get(i) == word for own in every[1:]))
    # Whoever ends a text has to do so with a token of all.
    if {tokenizer.eos_token_id for tokenizer in tokenizers} - {None} <= ids:
        for tokenizer in tokenizers:
            if {i for i, token in tokenizer.added_tokens_decoder.items() if not token.special} <= ids:
                return CommonVocabulary(tokenizer, ids)
    raise _mismatch(names, tokenizers, next(k for k, own in enumerate(every) if own != every[0]))


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return a tokenizer's tokens by id, without those that pad its vocabulary."""
    return {i: word for word, i in tokenizer.get_vocab().items() if not _PADDING.fullmatch(word)}


def _mismatch(names: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase], k: int) -> VocabularyMismatchError:
    """Say how member k's tokens differ from the first one's."""
    one, other = _by_id(tokenizers[0]), _by_id(tokenizers[k])
    ids = sorted(j for j in one.keys() | other.keys() if one.get(j) != other.get(j))
    shown = "; ".join(f"id {j}: {one.get(j)!r} and {other.get(j)!r}" for j in ids[:_SHOWN])
    return VocabularyMismatchError(
        f"expected members with one vocabulary, but {names[0]} ({len(one):,} tokens) and {names[k]} ({len(other):,} "
        f"tokens) differ in {len(ids):,} ids ({shown}{', …' if len(ids) > _SHOWN else ''}): choose members of one "
        "family, or combine them over bytes: vocabulary='bytes'"
    )


def token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of a tokenizer's tokens, without those that pad its vocabulary."""
    return frozenset(_by_id(tokenizer))


def token_support(ids: frozenset[int], names: Sequence[str], heads: Sequence[SoftmaxHead]) -> Bool[Tensor, " v"] | None:
    """Mark the ids that are tokens, over the rows of the largest head; None where all rows are.

    Raises:
        VocabularyMismatchError: a head has no row for some of them.
    """
    tokens = max(ids) + 1
    for name, head in zip(names, heads, strict=True):
        if head.v < tokens:
            raise VocabularyMismatchError(
                f"expected a head with a row for each of the tokenizer's {tokens:,} ids, but {name} has {head.v:,}: "
                "the checkpoint and its tokenizer do not belong together"
            )
    v = max(head.v for head in heads)
    if len(ids) == v:
        return None
    mask = torch.zeros(v, dtype=torch.bool, device=heads[0].weight.device)
    mask[list(ids)] = True
    return mask
