"""Text while it is generated: ``generate`` runs in a thread, and its streamer hands over each new piece of text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer

from softmeet.engine.recorder import Recorder
from softmeet.engine.text import Pieces
from softmeet.hf.arguments import arguments_of
from softmeet.hf.prompts import Prompt
from softmeet.rules.solution import Solution
from softmeet.suspended import StoppedError, controllable, outcomes

if TYPE_CHECKING:
    from softmeet.hf.modeling import EnsembleForCausalLM


class PieceStreamer(TextIteratorStreamer):
    """A streamer that gives the new text, without prompt and special tokens, in pieces as they become certain.

    A piece is the text of one token, or of the several that make up one character; so characters stay whole. Tokens
    without text give no piece.

    Args:
        tokenizer: decodes the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self._pieces = Pieces(tokenizer, special=False)

    def put(self, value: Tensor) -> None:
        """Take the prompt at first, then the tokens that one pass of the members drew, and give their text."""
        if self.next_tokens_are_prompt:
            super().put(value)  # which skips the prompt, and refuses several sequences
            return
        for token in value.flatten().tolist():
            self.give(self._pieces.push(token))

    def end(self) -> None:
        """Give what is left, an incomplete character, and say that nothing follows."""
        self.give(self._pieces.end())
        self.text_queue.put(self.stop_signal)

    def give(self, text: str) -> None:
        """Hand over the text that has become certain by one token, if there is any."""
        if text:
            self.text_queue.put(text)


def streamed(model: EnsembleForCausalLM, streamer: PieceStreamer, arguments: dict[str, Any]) -> Iterator[Any]:
    """Call ``model.generate`` in a thread, and yield what its streamer gives, as it comes.

    Work begins with the first piece asked for. Closing the iterator stops it, and so does its
    :func:`~softmeet.suspended.control`; either way nothing works any more when the iterator has ended.

    Args:
        model: the ensemble.
        streamer: a new one; the iterator yields what iterating over it does.
        arguments: those of ``model.generate`` for one prompt, without a streamer.

    Raises:
        Exception: whatever ``model.generate`` raises, after the pieces before it.
        StoppedError: if it was stopped by its control.
    """
    own, context = controllable()  # the thread has the caller's context, a limit of time among it

    def stop_all(input_ids: Int[Tensor, "B t"], scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), own.stopped, dtype=torch.bool, device=input_ids.device)

    criteria = StoppingCriteriaList([stop_all, *(arguments.get("stopping_criteria") or [])])
    arguments = {**arguments, "streamer": streamer, "stopping_criteria": criteria}
    run = torch.inference_mode()(model.generate)
    with ThreadPoolExecutor(1) as pool:
        works = [pool.submit(lambda: context.run(run, **arguments))]
        works[0].add_done_callback(lambda _: streamer.end())  # generate itself ends it only where nothing goes wrong
        try:
            yield from streamer
        except BaseException:
            own.stop()
            with suppress(StoppedError):
                outcomes(works, own)
            raise
        outcomes(works, own)


class PassDisagreement(Recorder):
    """A recorder that passes every solution on to another one, and keeps how far the members disagree at its rows.

    Its own counts stay as they are, except ``gate``, which it shares with the other recorder.

    Args:
        other: the recorder that counts.
    """

    def __init__(self, other: Recorder) -> None:
        super().__init__(gate=other.gate)
        self._other, self._passes = other, deque[list[list[float]]]()

    def add(self, solution: Solution, log_probs: Float[Tensor, "n B v"]) -> None:
        """Keep each member's disagreement at the rows of one pass, in nats; 0 where it did not run."""
        self._other.add(solution, log_probs)
        self._passes.append(solution.disagreement.nan_to_num(0.0).flatten(1).T.tolist())

    def take(self, count: int) -> list[list[float]]:
        """Return each member's disagreement at the first ``count`` rows of the oldest pass kept, and forget that pass.

        Each pass draws at least one token; assisted decoding draws several, and refuses the rows after them.
        """
        return self._passes.popleft()[:count]


class DisagreementStreamer(PieceStreamer):
    """A streamer that gives (new text, each member's disagreement there, in nats).

    A piece's figures are those of its token at which the members that ran disagree most.

    Args:
        tokenizer: decodes the tokens.
        recorder: counts what is solved; None for no record.

    Attributes:
        passes: the recorder to pass to the same call of ``generate`` as the streamer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recorder: Recorder | None = None) -> None:
        super().__init__(tokenizer)
        self.passes, self._next = PassDisagreement(recorder or Recorder()), deque[list[float]]()
        self._largest: list[float] = []
        self._silent = frozenset(tokenizer.all_special_ids)

    def put(self, value: Tensor) -> None:
        """Take the prompt at first, then the tokens that one pass of the members drew, and give their text."""
        if not self.next_tokens_are_prompt:
            tokens = value.flatten().tolist()
            pairs = zip(tokens, self.passes.take(len(tokens)), strict=True)
            self._next += [[] if token in self._silent else nats for token, nats in pairs]
        super().put(value)

    def give(self, text: str) -> None:
        """Hand over the text that has become certain by one token, with the largest figures since the last."""
        self._largest = max(self._largest, self._next.popleft() if self._next else [], key=sum)
        if text:
            self.text_queue.put((text, self._largest))
            self._largest = []


def by_member(
    model: EnsembleForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: Prompt,
    *,
    seed: int | None = None,
    recorder: Recorder | None = None,
    **options: Any,
) -> Iterator[tuple[str, list[float]]]:
    """Continue a prompt, and yield (new text, each member's disagreement there in nats, none for special tokens).

    Args:
        model: the ensemble.
        tokenizer: its tokenizer.
        text, seed, recorder, options: as of ``Ensemble.stream``.
    """
    streamer = DisagreementStreamer(tokenizer, recorder)
    arguments = arguments_of(model, tokenizer, [text], seed, streamer.passes, options)
    yield from streamed(model, streamer, arguments)
