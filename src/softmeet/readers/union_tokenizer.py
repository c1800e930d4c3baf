"""The tokenizer of ensembles over a union of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# No word is written so: of a word's letters none is a space.
_END = "<|end of text|>"
# What stands before the number of a word that another spells, too: no letter that stands for a byte.
_AGAIN = "\ue000"


def union_tokenizer(words: Sequence[bytes]) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose id k is the byte string ``words[k]``, and whose last id is the end, which also pads.

    It turns symbols into text. Text becomes symbols in some way, whole words where these are symbols and else bytes:
    members read texts as their own tokenizers cut them. Where words are equal, text becomes the first of them.

    Example:
        >>> union_tokenizer([b"a", b"b c"]).decode([1, 0, 2], skip_special_tokens=True)
        'b ca'
    """
    letters = bytes_to_unicode()
    vocabulary = dict[str, int]()
    for k, word in enumerate(words):
        name = "".join(letters[byte] for byte in word)
        vocabulary[name if name and name not in vocabulary else f"{name}{_AGAIN}{k}"] = k
    core = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if len(set(words) - {b""}) < len(words):
        core.decoder = decoders.Sequence([decoders.Replace(Regex(f"{_AGAIN}[0-9]+"), ""), decoders.ByteLevel()])
    core.add_special_tokens([AddedToken(_END, special=True)])
    assert core.token_to_id(_END) == len(words)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_END, eos_token=_END, pad_token=_END, padding_side="left",
        split_special_tokens=True, clean_up_tokenization_spaces=False,
    )  # fmt: skip
