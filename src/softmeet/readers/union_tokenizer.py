"""The tokenizer of ensembles over a union of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# No word is written so: of a word's letters none is a space.
_END = "<|end of text|>"


def union_tokenizer(words: Sequence[bytes]) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose id k is the byte string ``words[k]``, and whose last id is the end, which also pads.

    It turns symbols into text. Text becomes symbols in some way, whole words where these are symbols and else bytes:
    members read texts as their own tokenizers cut them.

    Example:
        >>> union_tokenizer([b"a", b"b c"]).decode([1, 0, 2], skip_special_tokens=True)
        'b ca'
    """
    letters = bytes_to_unicode()
    vocabulary = {"".join(letters[byte] for byte in word): k for k, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(_END, special=True)])
    assert core.token_to_id(_END) == len(words)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_END, eos_token=_END, pad_token=_END, padding_side="left",
        split_special_tokens=True, clean_up_tokenization_spaces=False,
    )  # fmt: skip
