"""Whether members share a vocabulary, and which ids are tokens of all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.errors import VocabularyMismatchError
from softmeet.members.opaque import Head

# How many ids that differ are named, and how many are looked at first.
_SHOWN, _SEEN = 5, 64
# Names that converters to GGUF give to rows of a head that stand for no token.
_PADDING = re.compile(r"\[PAD\d+\]")


@dataclass(frozen=True, eq=False)
class CommonVocabulary:
    """The tokens that all members' tokenizers have under one id, and a tokenizer that uses only these.

    Attributes:
        tokenizer: the first of the members' tokenizers that encodes ordinary text into tokens that all members have.
        ids: the ids that stand for the same token in all members.
    """

    tokenizer: PreTrainedTokenizerBase
    ids: frozenset[int]


def common_vocabulary(names: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase]) -> CommonVocabulary:
    """Find the tokens that all members have under the same id, and a tokenizer of a member that encodes into them.

    Vocabularies may differ in padding (``[PAD7]``, in GGUF files) and in added tokens (the tokenizers'
    ``added_tokens_decoder``), as those of a model and of its chat variant do. All other tokens have to be the same, and
    the tokens that end a text have to be common to all.

    Args:
        names: the members' names, for the message, in the order of ``tokenizers``.
        tokenizers: the members' tokenizers, at least one.

    Raises:
        VocabularyMismatchError: if the vocabularies differ in another way, or no tokenizer encodes ordinary text into
            common tokens alone; the message names ids that differ.
    """
    # GGUF files of one family share what is behind their tokenizers.
    cores = [id(getattr(tokenizer, "_tokenizer", tokenizer)) for tokenizer in tokenizers]
    known = {core: _by_id(tokenizer) for core, tokenizer in dict(zip(cores, tokenizers, strict=True)).items()}
    every = [known[core] for core in cores]
    added = [set(tokenizer.added_tokens_decoder) for tokenizer in tokenizers]
    for k, own in enumerate(every):
        # A token that one member added may be an ordinary token of another.
        if not (_has(own, every[0], added[0]) and _has(every[0], own, added[k])):
            raise _mismatch(names, every, k)
    ids = frozenset(i for i, word in every[0].items() if all(own.get(i) == word for own in every[1:]))
    # Each token that ends a text has to be a token of all members.
    if {tokenizer.eos_token_id for tokenizer in tokenizers} - {None} <= ids:
        for tokenizer in tokenizers:
            if {i for i, token in tokenizer.added_tokens_decoder.items() if not token.special} <= ids:
                return CommonVocabulary(tokenizer, ids)
    raise _mismatch(names, every, next(k for k, own in enumerate(every) if own != every[0]))


def surely_differ(tokenizers: Sequence[PreTrainedTokenizerBase]) -> bool:
    """Return whether :func:`common_vocabulary` would fail, as is seen at a few ids at once; False where it may not."""
    if not all(getattr(tokenizer, "is_fast", False) for tokenizer in tokenizers):
        return False  # others may raise an error at an id that they do not have
    first, *others = tokenizers
    ids = set(range(0, len(first), 1 + len(first) // _SEEN)) - set(first.added_tokens_decoder)
    words = [
        (i, word) for i in sorted(ids) if (word := first.convert_ids_to_tokens(i)) and not _PADDING.fullmatch(word)
    ]
    return any(other.convert_ids_to_tokens(i) != word for other in others for i, word in words)


def _has(one: dict[int, str], other: dict[int, str], added: set[int]) -> bool:
    """Return whether one vocabulary has what another has but for its added tokens, under the same ids."""
    return all(one.get(i) == word for i, word in other.items() if i not in added)


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return a tokenizer's tokens by id, without the ones that only pad its vocabulary."""
    every = tokenizer.get_vocab().items()
    return {i: word for word, i in every if not (word.startswith("[PAD") and _PADDING.fullmatch(word))}


def _mismatch(names: Sequence[str], every: Sequence[dict[int, str]], k: int) -> VocabularyMismatchError:
    """Make the error that says how the tokens of member ``k``, by their ids, differ from those of the first."""
    one, other = every[0], every[k]
    ids = sorted(j for j in one.keys() | other.keys() if one.get(j) != other.get(j))
    shown = "; ".join(f"id {j}: {one.get(j)!r} and {other.get(j)!r}" for j in ids[:_SHOWN])
    return VocabularyMismatchError(
        f"expected members with one vocabulary, but {names[0]} ({len(one):,} tokens) and {names[k]} ({len(other):,} "
        f"tokens) differ in {len(ids):,} ids ({shown}{', …' if len(ids) > _SHOWN else ''}): choose members of one "
        "family, or combine them over bytes: vocabulary='bytes'"
    )


def token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of a tokenizer's tokens, without padding of its vocabulary (tokens such as ``[PAD7]``)."""
    return frozenset(_by_id(tokenizer))


def token_support(ids: frozenset[int], names: Sequence[str], heads: Sequence[Head]) -> Bool[Tensor, " v"] | None:
    """Mark the ids that are tokens, among the v rows of the largest head.

    Args:
        ids: the ids that are tokens, at least one; made by :func:`common_vocabulary` or :func:`token_ids`.
        names: the members' names, for the message, in the order of ``heads``.
        heads: the members' output layers.

    Returns:
        (v,), True for ids that are tokens, on the first head's device; None if all of them are.

    Raises:
        VocabularyMismatchError: if a head has no row for some of the ids.
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
    mask = torch.zeros(v, dtype=torch.bool, device=heads[0].device)
    mask[list(ids)] = True
    return mask
