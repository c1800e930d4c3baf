"""How a sequence's next token is drawn from its distribution, with the options of transformers and of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers as tf
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.engine.masking import Mask, Structured
from softmeet.errors import SoftmeetError
from softmeet.hf.byte_modeling import WholeCharacters
from softmeet.noise import draw, require_seed
from softmeet.readers.bytes.covers import END

# Below this temperature the most probable token is taken: dividing by it could overflow fp32.
_COLD = 1e-4


@dataclass(frozen=True)
class Sampling:
    """The options by which a request's tokens are drawn; the defaults draw from the ensemble's distribution unchanged.

    Args:
        seed: the request's, of 64 bits; (seed, k) determines the noise by which sequence k of the request draws.
        is_seeded: whether the request gave the seed, so that its tokens are the same every time.
        temperature: 0 or more; divides the scores; below 10⁻⁴ the token with the largest score is taken.
        top_k: how many of the most probable tokens stay possible; 0 for all.
        top_p: only the most probable tokens stay possible, as few as have this share, above 0 and at most 1, of the
            probability together.
        min_p: the least probability, as a share of the largest, of tokens that stay possible; None for no such limit.
        repetition_penalty: a number above 0, as in transformers: scores of tokens that came before, prompt included,
            are divided by it if positive and multiplied by it if negative.
        presence_penalty: subtracted, in nats, from the score of every token that was drawn before.
        frequency_penalty: subtracted, in nats, once for each time that a token was drawn before.
        logit_bias: nats added to the scores of tokens, by token id, from 0 to v - 1.
        min_tokens: how many tokens are drawn before one that ends the sequence can come.
        mask: what the text has to be, over the ensemble's tokens; None for anything.
    """

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    mask: Mask | None = None
    is_seeded: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the ensemble's distribution as it is, by any random numbers."""
        return self == Sampling(self.seed, is_seeded=False)


class RepeatPenalties(tf.LogitsProcessor):
    """OpenAI's penalties on tokens that were drawn before, as a logits processor of transformers.

    Args:
        prompt_length: the number of leading tokens that do not count.
        presence: nats subtracted once from the score of each token that was drawn before.
        frequency: nats subtracted from it for each time that it was drawn before.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._start, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return a copy of the scores, in nats, from which the penalties are subtracted.

        Args:
            input_ids: each row's tokens so far, prompt included.
            scores: each row's log-probabilities or scores of the next token, over v tokens.
        """
        new = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add(-1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class NoEndBefore(tf.LogitsProcessor):
    """vLLM's ``min_tokens`` as a logits processor: a sequence does not end before it has so many new tokens.

    That of transformers, MinNewTokensLengthLogitsProcessor, needs to know the scores' device beforehand, and leaves no
    token possible where only an end was.

    Args:
        length: the number of tokens, prompt included, up to which none of ``ends`` can come.
        ends: the ids of the tokens that end a sequence.
    """

    def __init__(self, length: int, ends: Sequence[int]) -> None:
        self._length, self._ends = length, list(ends)

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return the scores, with -inf for the ends if ``input_ids`` has too few tokens and another one can come."""
        if input_ids.shape[-1] >= self._length:
            return scores
        found = scores.index_fill(-1, torch.tensor(self._ends, device=scores.device), -torch.inf)
        return torch.where(found.isneginf().all(-1, keepdim=True), scores, found)


class Sampler:
    """The choice of one sequence's tokens: its noise, and its processors of scores.

    Args:
        sampling: the request's options.
        key: the sequence's number within its request, from 0; the noise is determined by (seed, key).
        prompt_length: the number of prompt tokens, which ``min_tokens``, presence and frequency penalties do not count.
        ends: the ids of the tokens that end the sequence.
        over_bytes: whether tokens are bytes, of which only those are drawn that continue the text as UTF-8.

    Attributes:
        over_bytes: as given.
        greedy: whether the token with the largest score is taken instead of a draw.
        error: why the text cannot go on, as its structure is too complex; None while it can.
    """

    def __init__(
        self, sampling: Sampling, key: int, prompt_length: int, ends: Sequence[int] = (), *, over_bytes: bool = False
    ) -> None:
        s = sampling
        self.greedy, self.over_bytes = s.temperature < _COLD, over_bytes
        self._seed, self._key, self._start = require_seed(s.seed), key, prompt_length
        self.error: SoftmeetError | None = None
        found: list[tf.LogitsProcessor] = []
        if s.mask is not None:
            # Before truncation, which is to count only tokens that are allowed.
            found.append(Structured(s.mask, prompt_length))
        if s.repetition_penalty != 1:
            found.append(tf.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
        if s.presence_penalty or s.frequency_penalty:
            found.append(RepeatPenalties(prompt_length, s.presence_penalty, s.frequency_penalty))
        if s.min_tokens and ends:
            found.append(NoEndBefore(prompt_length + s.min_tokens, ends))
        self._reads_tokens = bool(found)
        if s.logit_bias:
            found.append(tf.SequenceBiasLogitsProcessor({(token,): float(x) for token, x in s.logit_bias.items()}))
        self._processors = found if self.greedy else [*found, *_warpers(s)]

    def noise(self, length: int) -> tuple[int, int, int]:
        """Return the seed, key and position of the noise for the token that follows ``length`` tokens."""
        return self._seed, self._key, length - self._start

    def scores(self, tokens: Sequence[int], log_probs: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """Return one row's scores, as :func:`next_scores` does, whether tokens are bytes or not."""
        if not self._processors:
            return log_probs
        ids = torch.tensor([tokens if self._reads_tokens else []], dtype=torch.int64, device=log_probs.device)
        found = log_probs[None]
        try:
            for processor in self._processors:
                found = processor(ids, found)
        except SoftmeetError as error:
            self.error = error
            return log_probs
        return found[0]


def _warpers(s: Sampling) -> list[tf.LogitsProcessor]:
    """Return transformers' processors for temperature and truncation (top-k, top-p, min-p), in its order."""
    found = [tf.TemperatureLogitsWarper(float(s.temperature))] if s.temperature != 1 else []
    found += [tf.TopKLogitsWarper(s.top_k)] if s.top_k else []
    found += [tf.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    return found + ([tf.MinPLogitsWarper(s.min_p)] if s.min_p is not None else [])


def next_scores(
    samplers: Sequence[Sampler], texts: Sequence[Sequence[int]], log_probs: Float[Tensor, "B v"]
) -> Float[Tensor, "B v"]:
    """Return the next token's scores, whose softmax is the distribution to draw it from.

    They are the log-probabilities in nats after penalties, biases, temperature and truncation, -inf for tokens that are
    left out. Temperature and truncation are not applied if a sampler is ``greedy``. Where a text cannot go on, its
    sampler's ``error`` is set, and the log-probabilities are returned as they are.

    Args:
        samplers: one per row, all over bytes or none.
        texts: each row's tokens so far, prompt included, at least one.
        log_probs: (B, v), the ensemble's log-probabilities of the next token, in nats.
    """
    if samplers[0].over_bytes:
        last = torch.tensor([[END] * max(0, 3 - len(text)) + list(text[-3:]) for text in texts])
        log_probs = WholeCharacters()(last, log_probs)
    rows = zip(samplers, texts, log_probs, strict=True)
    return torch.stack([sampler.scores(text, row) for sampler, text, row in rows])


def next_tokens(samplers: Sequence[Sampler], texts: Sequence[Sequence[int]], scores: Float[Tensor, "B v"]) -> list[int]:
    """Draw one token per row, which depends on that row's scores and its sampler's noise alone.

    Args:
        samplers: one per row; a greedy one takes the token with the largest score.
        texts: each row's tokens so far, prompt included.
        scores: (B, v), the rows' scores, as :func:`next_scores` returns them.

    Returns:
        the B token ids.
    """
    tokens = scores.argmax(-1)
    drawing = [k for k, sampler in enumerate(samplers) if not sampler.greedy]
    if drawing:
        rows = torch.tensor(drawing, device=scores.device)
        tokens[rows] = draw(scores[rows], [samplers[k].noise(len(texts[k])) for k in drawing])
    return tokens.tolist()
