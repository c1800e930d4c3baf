"""The bytes that each token of a tokenizer spells, and which tokenizers lose none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from softmeet.derived import derived
from softmeet.errors import VocabularyMismatchError
from softmeet.members.gguf_assets import folder_of

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
