"""Small tokenizers of the kinds that byte members read, and of those that they refuse."""

from __future__ import annotations

import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

END = "<|endoftext|>"
MERGES = ((b"t", b"h"), (b"th", b"e"), (b"e", b"r"), (b" ", b"th"), (b" th", b"e"), (b"h", b"e"), (b"\n", b"\n"))
SPACE = "\u2581"


def _fast(core, **special):
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_level(normalizer=None, *, regex=True, missing=b""):
    """As GPT-2's; with NFC as Qwen's."""
    letters = bytes_to_unicode()
    vocab = {END: 0}
    for byte in sorted(set(range(256)) - set(missing)):
        vocab[letters[byte]] = len(vocab)
    merges = []
    for pair in MERGES:
        left, right = ("".join(letters[byte] for byte in part) for part in pair)
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    return _fast(core, bos_token=END, eos_token=END)


def _pieces(letters="ehrt"):
    found = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        found[f"<0x{byte:02X}>"] = len(found)
    for piece in (SPACE, *letters, "th", "the", "er", SPACE + "th", SPACE + "the", "he"):
        found[piece] = len(found)
    return found


def _sentencepiece(core, *, dummy):
    before = [normalizers.Prepend(SPACE)] if dummy else []
    core.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if dummy else back)
    return _fast(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama(*, dummy=True, letters="ehrt"):
    """As Llama-2's; without the space before a text as Gemma's."""
    merges = [(SPACE, "th"), (SPACE + "th", "e"), ("t", "h"), ("th", "e"), ("e", "r"), ("h", "e")]
    core = Tokenizer(models.BPE(_pieces(letters), merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    return _sentencepiece(core, dummy=dummy)


def unigram():
    """As SentencePiece's other kind."""
    scores = [(piece, -1.0 - 0.1 * k % 3) for k, piece in enumerate(_pieces())]
    return _sentencepiece(Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True)), dummy=False)


KINDS = {
    "gpt2": byte_level,
    "no pre-tokens": lambda: byte_level(regex=False),
    "qwen": lambda: byte_level(normalizers.NFC()),
    "llama": llama,
    "gemma": lambda: llama(dummy=False),
    "unigram": unigram,
}


def word_level():
    """With one token for each letter, and none for other bytes."""
    core = Tokenizer(models.WordLevel({END: 0, "a": 1, "b": 2}, unk_token=END))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return _fast(core, bos_token=END, eos_token=END)


def word_piece():
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _fast(core, bos_token="[UNK]", eos_token="[UNK]")


REFUSED = {
    "lower-cases": lambda: byte_level(normalizers.Lowercase()),
    "applies NFKC": lambda: byte_level(normalizers.Sequence([normalizers.NFKC()])),
    "strips spaces": lambda: byte_level(normalizers.Strip()),
    "strips accents": lambda: byte_level(normalizers.StripAccents()),
    "replaces 'a'": lambda: byte_level(normalizers.Replace("a", "b")),
    "WordLevel vocabulary without bytes": word_level,
    "drops spaces": word_piece,
    "no token for 1 bytes \\(0x41\\)": lambda: byte_level(missing=b"A"),
}
