"""From tokens to text as it comes: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Text of one continuation.

    Args:
        tokenizer: a fast tokenizer of transformers'.
        stops: strings before which the text ends.

    Attributes:
        stopped: whether one of them came.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with one more token; often its own, sometimes none."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._decoded += len(piece)
        return self._release(piece, final=False)

    def end(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return self._release(whole[self._decoded :], final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)
