"""Text while it is generated: ``generate`` runs in a thread, and its streamer hands over each new piece of text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer

from softmeet.engine.recorder import Recorder
from softmeet.engine.text import Pieces
from softmeet.hf.prompts import Prompt, arguments_of
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
        works = list[Future[Any]]()
        try:
            works.append(pool.submit(lambda: context.run(run, **arguments)))
            works[0].add_done_callback(lambda _: streamer.end())  # generate itself ends it only if nothing goes wrong
            yield from streamer
        except BaseException:
            own.stop()
            with suppress(StoppedError):
                outcomes(works, own)
            raise
        outcomes(works, own)


# Each member's disagreement with the ensemble, and the log-probability that it gave to what was drawn, in nats.
Nats: TypeAlias = tuple[list[float], list[float]]


class PassMembers(Recorder):
    """A recorder that passes every solution on to another one, and keeps what the members said at its rows.

    Its own counts stay as they are, except ``gate``, which it shares with the other recorder.

    Args:
        other: the recorder that counts.
    """

    def __init__(self, other: Recorder) -> None:
        super().__init__(gate=other.gate)
        self._other, self._passes = other, deque[tuple[list[list[float]], Float[Tensor, "n B v"]]]()

    def add(self, solution: Solution, log_probs: Float[Tensor, "n B v"]) -> None:
        """Keep each member's disagreement, 0 where it did not run, and its log-probabilities at the rows of a pass."""
        self._other.add(solution, log_probs)
        self._passes.append((solution.disagreement.nan_to_num(0.0).flatten(1).T.tolist(), log_probs.flatten(1, -2)))

    def take(self, tokens: Sequence[int]) -> list[Nats]:
        """Return each member's figures at the tokens that the oldest pass kept has drawn, and forget that pass.

        Each pass draws at least one token; assisted decoding draws several, and refuses the rows after them.
        """
        nats, log_probs = self._passes.popleft()
        return [(nats[k], log_probs[:, k, token].tolist()) for k, token in enumerate(tokens)]


class MembersStreamer(PieceStreamer):
    """A streamer that gives (new text, each member's disagreement there, its log-probability of it), in nats.

    A piece's disagreement is that of its token at which the members that ran disagree most; log-probabilities are sums
    over its tokens.

    Args:
        tokenizer: decodes the tokens.
        recorder: counts what is solved; None for no record.

    Attributes:
        passes: the recorder to pass to the same call of ``generate`` as the streamer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recorder: Recorder | None = None) -> None:
        super().__init__(tokenizer)
        self.passes, self._next = PassMembers(recorder or Recorder()), deque[Nats]()
        self._largest, self._sums = list[float](), list[float]()
        self._silent = frozenset(tokenizer.all_special_ids)

    def put(self, value: Tensor) -> None:
        """Take the prompt at first, then the tokens that one pass of the members drew, and give their text."""
        if not self.next_tokens_are_prompt:
            tokens = value.flatten().tolist()
            told = zip(tokens, self.passes.take(tokens), strict=True)
            self._next += [([], []) if token in self._silent else nats for token, nats in told]
        super().put(value)

    def give(self, text: str) -> None:
        """Hand over the text that has become certain by one token, if there is any, with the figures since the last."""
        nats, log_probs = self._next.popleft() if self._next else ([], [])
        self._largest = max(self._largest, nats, key=sum)
        self._sums = [sum(pair) for pair in zip_longest(self._sums, log_probs, fillvalue=0.0)]
        if text:
            self.text_queue.put((text, self._largest, self._sums))
            self._largest, self._sums = [], []


def by_member(
    model: EnsembleForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: Prompt,
    *,
    seed: int | None = None,
    recorder: Recorder | None = None,
    **options: Any,
) -> Iterator[tuple[str, list[float], list[float]]]:
    """Continue a prompt, and yield new text with the members' figures as :class:`MembersStreamer` gives them.

    Args:
        model: the ensemble.
        tokenizer: its tokenizer.
        text, seed, recorder, options: as of ``Ensemble.stream``.
    """
    streamer = MembersStreamer(tokenizer, recorder)
    arguments = arguments_of(model, tokenizer, [text], seed, streamer.passes, options)
    yield from streamed(model, streamer, arguments)
