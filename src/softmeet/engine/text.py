"""``Pieces``: the text of tokens, piece by piece as they come, for every stream."""

from __future__ import annotations

from functools import partial
from typing import Any

from tokenizers.decoders import DecodeStream

# What a decoder writes for bytes that are no character, or not yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class _Decoding:
    """What ``DecodeStream`` does, for a tokenizer that is written in Python."""

    def __init__(self, *, skip_special_tokens: bool) -> None:
        self._skip = skip_special_tokens
        # The tokens of the newest piece, with their text, and those behind them.
        self._ids, self._newest, self._known = list[int](), 0, ""

    def step(self, tokenizer: Any, token: int) -> str | None:
        """Add a token, and return the text that has become certain by it; None if there is none."""
        self._ids.append(token)
        text = tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        if len(text) <= len(self._known) or text.endswith(REPLACEMENT):
            return None
        new = str(text[len(self._known) :])
        # Text may depend on whether there is a token before it.
        self._ids = self._ids[self._newest :]
        self._newest, self._known = len(self._ids), tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        return new


class Pieces:
    """The text of a sequence of tokens, piece by piece as they come; a character comes once it is complete.

    Args:
        tokenizer: one of transformers.
        special: whether special tokens are part of the text.

    Example:
        >>> from softmeet.readers.byte_tokenizer import byte_tokenizer
        >>> pieces = Pieces(byte_tokenizer(), special=False)
        >>> [pieces.push(byte) for byte in "aé".encode()], pieces.end()
        (['a', '', 'é'], '')
    """

    def __init__(self, tokenizer: Any, *, special: bool) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._core = getattr(tokenizer, "backend_tokenizer", tokenizer)
        kind: Any = _Decoding if self._core is tokenizer else DecodeStream
        self._begin = partial(kind, skip_special_tokens=not special)
        self._stream = self._begin()
        self._tokens, self._held, self._given = list[int](), list[int](), 0

    def push(self, token: int) -> str:
        """Add a token, and return the text that has become certain by it, perhaps none."""
        self._tokens.append(token)
        self._held.append(token)
        try:
            piece = self._step(token)
        except Exception:  # what it raises has no type of its own
            # Bytes that are no character have changed text before them that was given already: go on behind it.
            self._stream = self._begin()
            piece = "".join(map(self._step, self._held))
        if piece:
            self._held = []
        self._given += len(piece)
        return piece

    def end(self) -> str:
        """Return the text that was held back, as of a character that was begun; called once, after the last token."""
        whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=not self._special)
        return whole[self._given :]

    def _step(self, token: int) -> str:
        return self._stream.step(self._core, token) or ""
