"""The bytes that each token of a tokenizer spells, and the cutting of bytes into tokens as the tokenizer does it."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from io import BytesIO
from itertools import pairwise
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from softmeet.derived import derived
from softmeet.errors import VocabularyMismatchError
from softmeet.members.gguf_tokenizer import folder_of

_Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_Ordered: TypeAlias = tuple[_Numbers, np.ndarray[Any, np.dtype[np.uint8]], _Numbers]
_SPACE = "\u2581"
_KINDS = (
    "byte members need a tokenizer that can write every byte and loses none: byte-level BPE, or SentencePiece with "
    "byte fallback. Choose another member, or members that share this one's tokenizer (vocabulary='tokens')"
)
# The irreversible change that each of these components makes to a text before it is cut into tokens.
_CHANGES = {
    "Lowercase": "lower-cases text", "NFKC": "applies NFKC", "NFKD": "applies NFKD", "NFD": "applies NFD",
    "Strip": "strips spaces", "StripAccents": "strips accents", "BertNormalizer": "cleans text as BERT does",
    "Precompiled": "maps characters as SentencePiece does (nmt_nfkc)", "Nmt": "removes control characters",
    "Whitespace": "drops spaces", "WhitespaceSplit": "drops spaces", "BertPreTokenizer": "drops spaces",
    "CharDelimiterSplit": "drops a character",
}  # fmt: skip
# The bytes of white space, printable ASCII, and characters of planes 0 to 3; SmolLM2, for one, lacks 21 others.
_NEEDED = frozenset((*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)))


def parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the elementary components of a normalizer, pre-tokenizer or decoder, which may be a sequence."""
    if component is None:
        return
    inner = next((component[key] for key in ("normalizers", "pretokenizers", "decoders") if key in component), None)
    if inner is None:
        yield component
    else:
        for part in inner:
            yield from parts(part)


def refused(name: str, why: str) -> VocabularyMismatchError:
    """Make the error that says why a member cannot be read over bytes."""
    return VocabularyMismatchError(f"cannot use {name} over bytes: {why}; {_KINDS}")


def require_text_is_kept(name: str, described: dict[str, Any]) -> None:
    """Raise an error if the tokenizer's normalizer or pre-tokenizer loses or changes text."""
    for part in parts(described.get("normalizer")):
        kind = part["type"]
        if kind == "Replace" and (part["pattern"], part["content"]) == ({"String": " "}, _SPACE):
            continue
        if kind == "Replace":
            raise refused(name, f"its tokenizer replaces {next(iter(part['pattern'].values()))!r} in a text")
        if kind not in ("NFC", "Prepend"):
            raise refused(name, f"its tokenizer {_CHANGES.get(kind, f'changes text ({kind})')}")
    for part in parts(described.get("pre_tokenizer")):
        if part["type"] in _CHANGES or str(part.get("behavior")).lower() == "removed":
            raise refused(name, f"its tokenizer {_CHANGES.get(part['type'], 'drops what it splits at')}")


def _spelled(described: dict[str, Any]) -> dict[int, bytes]:
    """Return the bytes of each token by its id, added ones last; none if the vocabulary has no bytes."""
    model = described["model"]
    vocab = model["vocab"]
    pieces = {piece: k for k, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    kinds = {part["type"] for key in ("decoder", "pre_tokenizer") for part in parts(described.get(key))}
    found: dict[int, bytes] = {}
    if "ByteLevel" in kinds:
        back = {character: byte for byte, character in bytes_to_unicode().items()}
        for piece, k in pieces.items():
            if all(character in back for character in piece):
                found[k] = bytes(back[character] for character in piece)
    elif model.get("byte_fallback") or "ByteFallback" in kinds:
        found = {k: piece.replace(_SPACE, " ").encode() for piece, k in pieces.items()}
        fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        found |= {pieces[piece]: byte for piece, byte in fallback.items() if piece in pieces}
    else:
        return {}
    return found | {token["id"]: token["content"].encode() for token in described.get("added_tokens", [])}


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Return the bytes of each token of a tokenizer, by its id; special tokens have those of their names.

    It is empty if the tokenizer is not a fast one, or has a vocabulary without bytes, such as WordPiece's.
    """
    if not getattr(tokenizer, "is_fast", False):
        return {}
    return _spelled(description(tokenizer.backend_tokenizer))


def _words(name: str, described: dict[str, Any]) -> dict[int, bytes]:
    """Return the bytes that each ordinary token spells, by its id."""
    every, special = _spelled(described), {one["id"] for one in described.get("added_tokens", []) if one["special"]}
    if not every:
        kind = described["model"].get("type") or "tokenizer"
        raise refused(name, f"it has a {kind} vocabulary without bytes")
    found = {k: word for k, word in every.items() if word and k not in special}
    if missing := sorted(_NEEDED - {word[0] for word in found.values() if len(word) == 1}):
        shown = ", ".join(f"0x{byte:02X}" for byte in missing[:5])
        raise refused(name, f"its tokenizer has no token for {len(missing)} bytes ({shown})")
    return found


def ordered_words(name: str, tokenizer: PreTrainedTokenizerBase) -> _Ordered:
    """Return ordinary tokens by what they spell: (their ids, all of that, where each begins in it and at last its end).

    Those that spell the same are in the order of their ids. Of a GGUF file this is kept for the next time.

    Raises:
        VocabularyMismatchError: if there is no token for a byte that text needs.
    """
    make = partial(_ordered, name, tokenizer.backend_tokenizer)
    return derived(folder_of(tokenizer), "words.npz", make, _written, _read)


def _ordered(name: str, core: Tokenizer) -> _Ordered:
    own = _words(name, description(core))
    ordered = sorted(((k, own[k]) for k in sorted(own)), key=itemgetter(1))
    flat = np.frombuffer(b"".join(word for _, word in ordered), np.uint8)
    return np.array([k for k, _ in ordered]), flat, np.cumsum([0, *(len(word) for _, word in ordered)])


def _written(ordered: _Ordered) -> bytes:
    kept = BytesIO()
    np.savez(kept, *ordered)
    return kept.getvalue()


def _read(kept: bytes) -> _Ordered:
    with np.load(BytesIO(kept)) as found:
        return found["arr_0"], found["arr_1"], found["arr_2"]


def description(core: Tokenizer, *, with_tokens: bool = True) -> dict[str, Any]:
    """Describe a tokenizer as its JSON does, but for merges, which take long to write, and tokens where not wanted."""
    held = {key: getattr(core, key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    vocab = core.get_vocab(with_added_tokens=False) if with_tokens else {}
    model = {"type": type(core.model).__name__, "vocab": vocab}
    added = [
        {"id": k, "content": token.content, "special": token.special}
        for k, token in sorted(core.get_added_tokens_decoder().items())
    ]
    described = {key: None if part is None else json.loads(part.__getstate__()) for key, part in held.items()}
    fallback = bool(getattr(core.model, "byte_fallback", False))
    return {**described, "model": model | {"byte_fallback": fallback}, "added_tokens": added}


# What has a pre-tokenizer put nothing before a text.
_UNPREFIXED: dict[str, dict[str, Any]] = {
    "ByteLevel": {"add_prefix_space": False}, "Metaspace": {"prepend_scheme": "never"},
}  # fmt: skip
# A tokenizer that does nothing.
_EMPTY: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None, "decoder": None,
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}  # fmt: skip
_TRIED = ("A b  c\n\n\td", "\u00e9t\u00e9 \u65e5\u672c \U0001f642", " a~", "\u0130\ufb01 \u212b")


# Bytes that are not UTF-8, as Python escapes them.
_ESCAPED = re.compile("([\udc80-\udcff]+)")
# Characters of which a tokenizer makes tokens for a millisecond or more.
_LONG = 4096
_SPACED = re.compile(rb"[^\s] ")


@dataclass(frozen=True, eq=False)
class Spelling:
    """A tokenizer's ordinary tokens as byte strings, sorted; made by :func:`spelling_of`.

    A token's *number* is its index in this order, not its id.

    Attributes:
        name: the member's, for messages.
        words: m byte strings, sorted: what each token spells; two tokens may spell the same.
        tokens: (m,), the token id of each word.
        flat: all words one after another, (bytes,) uint8.
        offsets: (m + 1,), the index in ``flat`` at which each word begins, and at last its length.
        end: the id of the tokenizer's token that ends a text, or None; a model's configuration may name further ones.
        start: ids of the tokens before each text: those that the tokenizer puts there, else one that begins texts, or a
            line break's.
        dummy: bytes that the tokenizer puts before each text, such as SentencePiece's space; may be empty.
        unwritable: the bytes that no token spells; :meth:`encode` leaves them out. They are among the control
            characters and the bytes that no character of Unicode's planes 0 to 3 has in UTF-8.
        typical: (256, 257): for each last byte of a token, the probabilities of the first byte of the next token, and
            at 256 of the end. In a new spelling, they are the shares of tokens that begin with the byte, equal in all
            rows.
    """

    name: str
    words: list[bytes]
    tokens: np.ndarray[Any, np.dtype[np.int64]]
    flat: np.ndarray[Any, np.dtype[np.uint8]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    end: int | None
    start: tuple[int, ...]
    dummy: bytes
    unwritable: bytes
    _core: Tokenizer
    _own: dict[int, bytes]
    typical: np.ndarray[Any, np.dtype[np.float64]]

    def last(self, token: int) -> int:
        """Return the last byte, 0 to 255, that a token spells; KeyError if ``token`` is not an ordinary token's id."""
        return self._own[token][-1]

    @cached_property
    def beginnings(self) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.int64]]]:
        """The distinct first bytes of words, (k,) uint8, and the number of the first word with each, (k,) int64."""
        return np.unique(self.flat[self.offsets[:-1]], return_index=True)

    @cached_property
    def longest(self) -> int:
        """The length in bytes of the longest word."""
        return max(map(len, self.words))

    def among(self, rest: bytes, low: int = 0, high: int | None = None) -> tuple[int, int, int]:
        """Find the words that begin with ``rest``, among those numbered ``low`` to ``high - 1``.

        Args:
            rest: the bytes that the words have to begin with.
            low, high: the range of numbers to search; ``high`` is None for all from ``low``.

        Returns:
            (first, longer, end): words ``first`` to ``longer - 1`` equal ``rest``; words ``longer`` to ``end - 1``
            begin with it and are longer.
        """
        high = len(self.words) if high is None else high
        first = bisect_left(self.words, rest, low, high)
        end = bisect_left(self.words, _next(rest), first, high) if rest.strip(b"\xff") else high
        return first, bisect_right(self.words, rest, first, end), end

    def spelled(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes that tokens spell, given their ids; special tokens and unknown ids spell nothing."""
        return b"".join(self._own.get(token, b"") for token in tokens)

    def length(self, token: int) -> int:
        """Return the number of bytes that a token spells, given its id."""
        return len(self._own.get(token, b""))

    def bounds(self, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return where t tokens (ids) begin in the bytes they spell, and the number of these bytes, (t + 1,) int64."""
        return np.cumsum([0, *map(self.length, tokens)])

    def written(self, text: bytes) -> bytes:
        """Return the bytes that tokens spell for a text: ``dummy`` and the text, without ``unwritable`` bytes."""
        return self.dummy + text.translate(None, self.unwritable)

    def encode(self, text: bytes) -> list[int]:
        """Cut ``dummy`` followed by a text into tokens as the tokenizer does, and return their ids.

        The tokens spell exactly these bytes, but for bytes that no token spells, which are left out. Bytes that are not
        UTF-8 become the longest tokens that fit; a text is not normalised to NFC first, even if the tokenizer does so;
        the text of a special token becomes ordinary tokens.
        """
        return self.cut(self.written(text))

    @cached_property
    def inner_spaces(self) -> frozenset[bytes]:
        """The pairs of a byte and a space that stand within words, behind no other space."""
        return frozenset(pair for word in self.words for pair in _SPACED.findall(word))

    def cut(self, written: bytes) -> list[int]:
        """Cut bytes into tokens as the tokenizer cuts text, and return their ids."""
        found = list[int]()
        for k, part in enumerate(_ESCAPED.split(written.decode(errors="surrogateescape"))):
            whole = part.encode(errors="surrogateescape")
            tokens = [] if k % 2 else self._encoded(part)
            found += tokens if self.spelled(tokens) == whole else self._longest(whole)
        return found

    def cut_writable(self, text: bytes) -> list[int]:
        """Cut bytes into tokens as :meth:`cut` does, but for those that no token spells, which are left out."""
        return self.cut(text.translate(None, self.unwritable))

    def _encoded(self, part: str) -> list[int]:
        """Return the ids of the tokenizer's tokens of some characters."""
        if len(part) < _LONG:
            found: list[int] = self._core.encode(part, add_special_tokens=False).ids
        else:
            # A batch is encoded without Python's lock, so that other threads go on beside it.
            found = self._core.encode_batch([part], add_special_tokens=False)[0].ids
        return found

    def _longest(self, text: bytes) -> list[int]:
        """Cut bytes into tokens, the longest that fits first, for text that the tokenizer itself would change."""
        found = list[int]()
        while text:
            for length in range(min(self.longest, len(text)), 0, -1):
                first, longer, _ = self.among(text[:length])
                if first < longer:
                    # Of tokens that spell the same, a byte that stands in for missing tokens has the lowest id.
                    found.append(int(self.tokens[longer - 1]))
                    text = text[length:]
                    break
        return found


def _next(rest: bytes) -> bytes:
    """Return the least byte string that is greater than all that begin with ``rest``."""
    rest = rest.rstrip(b"\xff")
    return rest[:-1] + bytes([rest[-1] + 1])


def _core(original: Tokenizer, described: dict[str, Any], *, dummy: bool = True) -> Tokenizer:
    """Make a tokenizer without normalisation to NFC, and such that special tokens' text is ordinary text.

    Args:
        original: the tokenizer, with which the other one shares its tokens and merges.
        described: what :func:`description` says of it.
        dummy: whether it puts before a text what the original puts there.
    """
    left_out = {"NFC"} if dummy else {"NFC", "Prepend"}
    kept = [part for part in parts(described["normalizer"]) if part["type"] not in left_out]
    changed = {} if dummy else _UNPREFIXED
    before = [part | changed.get(part["type"], {}) for part in parts(described["pre_tokenizer"])]
    around = Tokenizer.from_str(
        json.dumps(_EMPTY | {
            "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": before} if before else None,
        })
    )  # fmt: skip
    core = Tokenizer(original.model)
    for key in ("normalizer", "pre_tokenizer"):
        if (part := getattr(around, key)) is not None:
            setattr(core, key, part)
    core.add_tokens([token for _, token in sorted(original.get_added_tokens_decoder().items())])
    core.encode_special_tokens = True
    return core


def _start(tokenizer: PreTrainedTokenizerBase, core: Tokenizer) -> tuple[int, ...]:
    """Return the ids before a text: what the tokenizer puts there, else ``<|endoftext|>`` or BOS, else a line break.

    A tokenizer without a BOS, or with one that it says not to add, as of Qwen 2.5, is of a model that may predict a
    text badly behind such a token. What was made of a GGUF file and saved has a BOS, and no longer says not to add it:
    then its class tells.
    """
    marked, plain = (tokenizer("a", add_special_tokens=own)["input_ids"] for own in (True, False))
    before = tuple(marked[: len(marked) - len(plain)]) if marked[len(marked) - len(plain) :] == plain else marked[:1]
    if len(marked) > len(plain) and before:
        return tuple(before)
    by_default = signature(type(tokenizer)).parameters.get("bos_token")
    unused = by_default is not None and by_default.default is None
    if unused or tokenizer.bos_token_id is None or tokenizer.init_kwargs.get("add_bos_token") is False:
        return tuple(core.encode("\n", add_special_tokens=False).ids)
    return (tokenizer.get_vocab().get("<|endoftext|>", tokenizer.bos_token_id),)


def spelling_of(name: str, tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """Find the bytes that each token of a member's tokenizer spells, and return them as a :class:`Spelling`.

    Args:
        name: the member's, for messages.
        tokenizer: a fast tokenizer of transformers (byte-level BPE, or SentencePiece with byte fallback).

    Raises:
        VocabularyMismatchError: if the tokenizer is not a fast one, changes or loses text (say, lower-cases it), lacks
            a token for a byte that text needs.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise refused(name, "its tokenizer is written in Python, and its tokens cannot be read")
    described = description(tokenizer.backend_tokenizer, with_tokens=False)
    require_text_is_kept(name, described)
    tokens, flat, offsets = ordered_words(name, tokenizer)
    every, ends = flat.tobytes(), offsets.tolist()
    words = [every[start:end] for start, end in pairwise(ends)]
    own = dict(zip(tokens.tolist(), words, strict=True))
    core = _core(tokenizer.backend_tokenizer, described)
    single = {word[0] for word in words if len(word) == 1}
    tried = core.encode("a", add_special_tokens=False).ids
    dummy = b"".join(own.get(k, b"") for k in tried).removesuffix(b"a")
    beginnings = np.bincount(flat[offsets[:-1]], minlength=257) / len(words)
    spelling = Spelling(
        name=name, words=words, tokens=tokens, flat=flat, offsets=offsets, typical=np.tile(beginnings, (256, 1)),
        end=tokenizer.eos_token_id, start=_start(tokenizer, core), dummy=dummy,
        unwritable=bytes(sorted(set(range(256)) - single)), _own=own,
        _core=_core(tokenizer.backend_tokenizer, described, dummy=False),
    )  # fmt: skip
    for text in _TRIED:
        found = spelling.spelled(core.encode(text, add_special_tokens=False).ids)
        if found.removeprefix(dummy) != text.encode() and found != text.encode():
            raise refused(name, f"its tokenizer turns {text!r} into {found.decode(errors='replace')!r}")
    return spelling


def shared_words(one: Spelling, other: Spelling) -> int:
    """Count the byte strings that are tokens of both tokenizers."""
    return len(set(one.words) & set(other.words))


def shared_boundaries(one: Spelling, other: Spelling, text: bytes) -> tuple[float, float]:
    """Compute how many ends of tokens two tokenizers have in common in a text.

    Args:
        one, other: the tokenizers' spellings, as :func:`spelling_of` returns them.
        text: any bytes, cut into tokens by :meth:`Spelling.encode`; the text's own end counts as an end of a token.

    Returns:
        (the share, from 0 to 1, of the token ends of ``one`` at which a token of ``other`` ends too; the share of the
        token ends of ``other`` at which a token of ``one`` ends too).
    """
    ends = [set((own.bounds(own.encode(text))[1:] - len(own.dummy)).tolist()) for own in (one, other)]
    both = len(ends[0] & ends[1])
    return both / max(1, len(ends[0])), both / max(1, len(ends[1]))
