"""Limits of a call of ``generate`` over bytes: they count the tokens of answers, or their bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from softmeet.engine.limits import AnswerLength
from softmeet.errors import InvalidInputError
from softmeet.members.trunk import CACHE
from softmeet.readers.reader import Alphabet


class AnswersEnd(StoppingCriteria):
    """Ends the rows of a call of ``generate`` where their answers have come to a limit.

    Args:
        width: the number of symbols of every row's prompt, padding included.
        begun: makes the length of an answer that has no symbol yet.
    """

    def __init__(self, width: int, begun: Callable[[], AnswerLength]) -> None:
        self._width, self._begun = width, begun
        self._rows: list[tuple[list[int], AnswerLength]] = []

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Any, **kwargs: Any) -> Bool[Tensor, " B"]:
        """Return a mask, (B,), of the rows whose answers are over."""
        found = []
        for k, row in enumerate(input_ids[:, self._width :].tolist()):
            known = self._rows[k] if k < len(self._rows) else ([], self._begun())
            # Beams change places.
            length = known[1] if known[0] == row[:-1] else self._read(row[:-1])
            if row and not length.is_over:
                length.push(row[-1])
            found.append((row, length))
        self._rows = found
        return torch.tensor([length.is_over for _, length in found], device=input_ids.device)

    def _read(self, row: Sequence[int], ends: Collection[int] = ()) -> AnswerLength:
        """Return the length of an answer up to its end, one of ``ends`` or a limit."""
        length = self._begun()
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
    alphabet: Alphabet,
    usual: Any,
    inputs: Int[Tensor, "B t"] | None,
    config: Any,
    options: dict[str, Any],
) -> Any:
    """Call transformers' ``generate`` such that ``max_new_tokens`` counts the tokens of new texts.

    Args:
        generate: the function, which counts symbols, as ``max_length`` and ``min_new_tokens`` always do.
        alphabet: that of the symbols, by which tokens are counted.
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
    begun = partial(AnswerLength, alphabet, most, most_bytes)
    answers = AnswersEnd(1 if prompts is None else prompts.shape[1], begun)
    options["max_new_tokens"] = begun().longest
    options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), answers])
    if options.get("streamer") is not None:
        options["streamer"] = WholeCharacterStreamer(options["streamer"], begun())
    found = generate(inputs, generation_config=config, **options)
    ends, pad = (options.get(name, getattr(own, name)) for name in ("eos_token_id", "pad_token_id"))
    known = [ends] if isinstance(ends, int) else ends or [], min(alphabet.ends) if pad is None else pad
    if isinstance(found, Tensor):
        return answers.cut(found, *known)
    whole, found.sequences = found.sequences, answers.cut(found.sequences, *known)
    return _without_last(found, whole.shape[1] - found.sequences.shape[1])


def _without_last(found: Any, count: int) -> Any:
    """Return what ``generate`` gives beside the texts without the last ``count`` steps, the cache among it."""
    for name in ("scores", "logits") if count else ():
        if (steps := found.get(name)) is not None:
            found[name] = steps[:-count]
    if count and found.get(CACHE) is not None:
        found[CACHE].crop(-count)
    return found
