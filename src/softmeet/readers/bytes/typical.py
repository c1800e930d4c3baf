"""Which byte a member expects after a token, given the token's last byte alone: averages over a short sample text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from softmeet.derived import derived
from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.next_tokens import SYMBOLS, Masses
from softmeet.readers.bytes.token_model import TokenModel

# Prose, code, lists and figures, so that every kind of last byte occurs in several surroundings.
SAMPLE = files("softmeet.readers.bytes").joinpath("sample.txt").read_text(encoding="utf-8")
# The shares of first bytes among all tokens count as this many observations of each kind, since some kinds are rare.
_PRIOR = 4.0
# Positions whose next tokens' probabilities are held at once.
_AT_ONCE = 32


def expected_after_bytes(member: TokenModel) -> Masses:
    """Run a member on :data:`SAMPLE`, and return :func:`typical` of what it expects there, (256, 257).

    Of a GGUF file this is kept for the next time.
    """
    start, spelling = member.spelling.start, member.spelling
    tokens = spelling.encode(SAMPLE.encode())[: member.limit - len(start)]

    def made() -> Masses:
        with member.reader.to_itself():
            behind = member.run_chain(start, tokens, range(1, len(tokens) + 1))
        roots = list[Masses]()
        for k in range(0, len(behind), _AT_ONCE):
            some = behind[k : k + _AT_ONCE]
            roots += [one.root for one in member.next_token_probs(some, [0] * len(some))]
        return typical(spelling, tokens, roots)

    mark = hashlib.sha256(repr((*start, *tokens)).encode()).hexdigest()[:16]
    return derived(
        member.assets, f"typical-{mark}", made, lambda found: found.tobytes(),
        lambda kept: np.frombuffer(kept).reshape(256, SYMBOLS),
    )  # fmt: skip


def kind(byte: int) -> int:
    r"""Classify a byte: part of a letter 0, digit 1, space or tab 2, end of a line 3, opening bracket 4, other 5.

    Bytes from 0x80, which are parts of characters in UTF-8, count as letters.

    Example:
        >>> [kind(byte) for byte in b"a1 \n(."]
        [0, 1, 2, 3, 4, 5]
    """
    one = chr(byte)
    is_letter = byte >= 0x80 or one.isalpha()
    return [is_letter, one.isdigit(), one in " \t", one in "\r\n", one in "([{<", True].index(True)


def typical(spelling: Spelling, tokens: Sequence[int], roots: Sequence[Masses]) -> Masses:
    """Average the model's distributions of the byte after a token over tokens whose last bytes are of one :func:`kind`.

    Args:
        spelling: the tokenizer's, as :func:`spelling_of` returns it, so that all rows of its own ``typical`` are equal;
            such a row counts as the distributions after four further tokens of each kind.
        tokens: the ids of the tokens of :data:`SAMPLE`.
        roots: after each of these tokens, the probabilities of the first byte of the next token and, at 256, of the
            end: (257,) each.

    Returns:
        (256, 257), for each last byte of a token the probabilities of the first byte of the next token, at 256 of the
        end.
    """
    sums, counts = _PRIOR * spelling.typical[:6], np.full(6, _PRIOR)
    for token, root in zip(tokens, roots, strict=True):
        own = kind(spelling.last(token))
        sums[own] += root
        counts[own] += 1
    found: Masses = (sums / counts[:, None])[[kind(byte) for byte in range(256)]]
    return found
