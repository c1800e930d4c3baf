"""The tokenizer of ensembles over bytes: a token for each byte, and one for the end of a text, which also pads."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from softmeet.readers.bytes.next_tokens import END

_END = "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose ids are the bytes of a text in UTF-8; id 256 is the end, and no text encodes to it.

    Example:
        >>> byte_tokenizer()("é")["input_ids"]
        [195, 169]
    """
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    core = Tokenizer(models.BPE(letters, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(_END, special=True)])
    assert core.token_to_id(_END) == END
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_END, eos_token=_END, pad_token=_END, padding_side="left",
        split_special_tokens=True, clean_up_tokenization_spaces=False,
    )  # fmt: skip
