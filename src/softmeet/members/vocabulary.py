"""Whether members share a vocabulary, and which rows of their heads are tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.errors import VocabularyMismatchError
from softmeet.heads import SoftmaxHead

_SHOWN = 5


def require_same_vocabulary(names: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """Every tokenizer must give the same ids to the same tokens as the first.

    Raises:
        VocabularyMismatchError: one does not; the message says which tokens differ.
    """
    first = tokenizers[0].get_vocab()
    for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True):
        other = tokenizer.get_vocab()
        if other == first:
            continue
        by_id, by_id_other = _by_id(first), _by_id(other)
        ids = sorted(i for i in by_id.keys() | by_id_other.keys() if by_id.get(i) != by_id_other.get(i))
        shown = "; ".join(f"id {i}: {by_id.get(i)!r} and {by_id_other.get(i)!r}" for i in ids[:_SHOWN])
        raise VocabularyMismatchError(
            f"expected members with one vocabulary, but {names[0]} ({len(first):,} tokens) and {name} ({len(other):,} "
            f"tokens) differ in {len(ids):,} ids ({shown}{', …' if len(ids) > _SHOWN else ''}): choose members of one "
            "family, or combine them over bytes: vocabulary='bytes'"
        )


def _by_id(vocabulary: dict[str, int]) -> dict[int, str]:
    return {index: token for token, index in vocabulary.items()}


def token_support(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], heads: Sequence[SoftmaxHead]
) -> Bool[Tensor, " v"] | None:
    """A mask of the ids that are tokens, over the rows of the largest head; None where no head is padded.

    Raises:
        VocabularyMismatchError: a head has fewer rows than the tokenizer has tokens.
    """
    tokens = max(tokenizer.get_vocab().values()) + 1
    for name, head in zip(names, heads, strict=True):
        if head.v < tokens:
            raise VocabularyMismatchError(
                f"expected a head with a row for each of the tokenizer's {tokens:,} ids, but {name} has {head.v:,}: "
                "the checkpoint and its tokenizer do not belong together"
            )
    v = max(head.v for head in heads)
    if tokens == v:
        return None
    mask: Tensor = torch.arange(v, device=heads[0].weight.device) < tokens
    return mask
