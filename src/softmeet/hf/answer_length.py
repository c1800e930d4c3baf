"""How long an answer over bytes is: in tokens, as the first member's tokenizer cuts the answer alone.

A further character may join the tokens before it, so that a text has as many tokens as it had at most behind any of its
characters. An answer ends before the first character with which these would be more than it may have. Bytes that are no
character count as the tokenizer cuts them, and a symbol 256 that does not end the text as a token.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from softmeet.errors import InvalidInputError
from softmeet.members.spelling import Spelling
from softmeet.readers.bytes.covers import END

# Up to so many bytes before its end, a text may be cut otherwise once more is written.
_REACH = 64
# A space behind something else, where most tokenizers cut every text.
_CUT = re.compile(rb"(?<=\S) ")
# The bytes of a character at most.
_CHARACTER = 4


def tokens_in(spelling: Spelling, text: bytes) -> int:
    """Return how many tokens a tokenizer makes of a text, none of an empty one."""
    return len(spelling.encode(text)) if text else 0


class AnswerLength:
    """The length of an answer that is written symbol by symbol (a byte, or 256), and whether it may go on.

    Args:
        spelling: of the first member's tokenizer.
        most: the most tokens, at least 0; None for any number.
        most_bytes: the most symbols, at least 0; None for any number.

    Attributes:
        count: the number of symbols so far.
        kept: how many of them belong to the answer for certain: all but a character that has not ended, or with which
            the answer would be too long.
        is_over: whether the answer has come to a limit.
    """

    def __init__(self, spelling: Spelling, most: int | None, most_bytes: int | None = None) -> None:
        self._spelling, self._most = spelling, most
        self._text, self._decoder = bytearray(), codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.count, self.kept, self.is_over = 0, 0, 0 in (most, most_bytes)
        # A token has a byte or more: up to so many symbols cannot be too many tokens.
        self._fitting = 0 if most is None else most - len(spelling.dummy)
        # Bytes that no token spells make no tokens.
        in_tokens = [] if most is None else [most * spelling.longest + _CHARACTER * (most > 0)]
        self._longest = min([*in_tokens, *([] if most_bytes is None else [most_bytes])], default=None)

    @property
    def longest(self) -> int | None:
        """The most symbols that are written, those of a character too many included; None for any number."""
        return self._longest

    def push(self, symbol: int) -> bool:
        """Take note of the next symbol, and return whether another one may follow."""
        self.count += 1
        written = ""
        if symbol != END:
            self._text.append(symbol)
            written = self._decoder.decode(bytes([symbol]))
        if not self._decoder.getstate()[0]:
            self.is_over = self._exceeds(written)
            self.kept = self.kept if self.is_over else self.count
        if not self.is_over and self._longest is not None and self.count >= self._longest:
            self.kept, self.is_over = self.count, True
        return not self.is_over

    def _exceeds(self, written: str) -> bool:
        """Return whether the answer has too many tokens, now that it ends with these characters.

        It is cut into tokens, as a whole, only where that may be.
        """
        if self._most is None or (self.count <= self._fitting and not any(map(_is_odd, written))):
            return False
        text, ends = bytes(self._text), self.count - len(self._text)
        left = self._most - ends - tokens_in(self._spelling, text)
        cuts = [found.start() for found in _CUT.finditer(text, max(1, len(text) - _REACH))]
        self._fitting = self.count + left - (len(text) - cuts[-1] if cuts and _cuts(self._spelling) else _REACH)
        return left < 0


@lru_cache(maxsize=16)
def _cuts(spelling: Spelling) -> bool:
    """Return whether no token has a space behind something else, so that every text is cut there."""
    return not any(map(_CUT.search, spelling.words))


def _is_odd(character: str) -> bool:
    """Return whether a character is no letter, mark, number or punctuation, so that a tokenizer may change it.

    The whole text is then cut in another way.
    """
    return not character.isascii() and unicodedata.category(character)[0] in "SC"


class AnswersEnd(StoppingCriteria):
    """Ends the rows of a call of ``generate`` where their answers have come to a limit.

    Args:
        width: the number of symbols of every row's prompt, padding included.
        spelling, most, most_bytes: as of :class:`AnswerLength`.
    """

    def __init__(self, width: int, spelling: Spelling, most: int | None, most_bytes: int | None = None) -> None:
        self._width, self._limits = width, (spelling, most, most_bytes)
        self._rows: list[tuple[list[int], AnswerLength]] = []

    def begun(self) -> AnswerLength:
        """Return the length of an answer that has no symbol yet."""
        return AnswerLength(*self._limits)

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Any, **kwargs: Any) -> Bool[Tensor, " B"]:
        """Return a mask, (B,), of the rows whose answers are over."""
        found = []
        for k, row in enumerate(input_ids[:, self._width :].tolist()):
            known = self._rows[k] if k < len(self._rows) else ([], self.begun())
            # Beams change places.
            length = known[1] if known[0] == row[:-1] else self._read(row[:-1])
            if row and not length.is_over:
                length.push(row[-1])
            found.append((row, length))
        self._rows = found
        return torch.tensor([length.is_over for _, length in found], device=input_ids.device)

    def _read(self, row: Sequence[int], ends: Collection[int] = ()) -> AnswerLength:
        """Return the length of an answer up to its end, one of ``ends`` or a limit."""
        length = self.begun()
        for symbol in row:
            if not length.push(symbol) or symbol in ends:
                break
        return length

    def cut(self, ids: Int[Tensor, "B t"], ends: Collection[int], pad: int) -> Int[Tensor, "B s"]:
        """Return rows without what is behind their answers, padded on the right with ``pad``."""
        found, kept = ids.clone(), [self._width]
        for row, out in zip(ids[:, self._width :].tolist(), found, strict=True):
            length = self._read(row, ends)
            kept.append(self._width + (length.kept if length.is_over else length.count))
            out[kept[-1] :] = pad
        return found[:, : max(kept)]


class WholeCharacterStreamer:
    """A streamer that passes on to another what belongs to an answer, once a character is whole.

    Args:
        streamer: gets the prompt and the symbols.
        length: of the answer.
    """

    def __init__(self, streamer: Any, length: AnswerLength) -> None:
        self._streamer, self._length = streamer, length
        self._held: list[Tensor] | None = None
        self._given = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt at first, then symbols."""
        if self._held is None:
            self._held = []
            self._streamer.put(value)
            return
        self._held.append(value)
        for symbol in value.flatten().tolist():
            if self._length.is_over or not self._length.push(symbol):
                break
        if self._length.is_over or self._length.kept == self._length.count:
            self._give(self._length.kept)

    def end(self) -> None:
        """Pass on a character that was begun and could not end, and say that nothing follows."""
        if not self._length.is_over:
            self._give(self._length.count)
        self._streamer.end()

    def _give(self, upto: int) -> None:
        for value in self._held or ():
            if len(part := value.flatten()[: upto - self._given]):
                self._streamer.put(part)
                self._given += len(part)
        self._held = []


def within_limits(
    generate: Callable[..., Any],
    spelling: Spelling,
    usual: Any,
    inputs: Int[Tensor, "B t"] | None,
    config: Any,
    options: dict[str, Any],
) -> Any:
    """Call transformers' ``generate`` such that ``max_new_tokens`` counts the tokens of new texts.

    Args:
        generate: the function, which counts symbols, as ``max_length`` and ``min_new_tokens`` always do.
        spelling: of the first member's tokenizer.
        usual: the model's generation configuration.
        inputs, config, options: the function's arguments; the options may also hold ``max_bytes``, the most new bytes.

    Raises:
        InvalidInputError: if ``max_bytes`` is no number from 1; and whatever ``generate`` raises.
    """
    own, most_bytes = config or usual, options.pop("max_bytes", None)
    if most_bytes is not None and not (type(most_bytes) is int and most_bytes > 0):
        raise InvalidInputError(f"expected max_bytes as a number of bytes from 1, got {most_bytes!r}")
    most = options.get("max_new_tokens", own.max_new_tokens)
    is_none, is_number = most is None, type(most) is int and most > 0
    if not is_number and not (is_none and most_bytes):
        return generate(inputs, generation_config=config, **options)  # which refuses what is no number
    prompts = options.get("input_ids") if inputs is None else inputs
    answers = AnswersEnd(1 if prompts is None else prompts.shape[1], spelling, most, most_bytes)
    options["max_new_tokens"] = answers.begun().longest
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), answers])
    if options.get("streamer") is not None:
        options["streamer"] = WholeCharacterStreamer(options["streamer"], answers.begun())
    found = generate(inputs, generation_config=config, **options)
    ends, pad = (options.get(name, getattr(own, name)) for name in ("eos_token_id", "pad_token_id"))
    known = [ends] if isinstance(ends, int) else ends or [], END if pad is None else pad
    if isinstance(found, Tensor):
        return answers.cut(found, *known)
    whole, found.sequences = found.sequences, answers.cut(found.sequences, *known)
    return _without_last(found, whole.shape[1] - found.sequences.shape[1])


def _without_last(found: Any, count: int) -> Any:
    """Return what ``generate`` gives beside the texts without the last ``count`` steps, the cache among it."""
    for name in ("scores", "logits") if count else ():
        if (steps := found.get(name)) is not None:
            found[name] = steps[:-count]
    if count and found.get("cache") is not None:
        found.cache.crop(-count)
    return found
