"""Draw a sequence's next token from its distribution, with the options of transformers and of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers as tf
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.hf.sampling import draw, row_generator

# Colder than this, the most probable token is all that is left, and fp32 would overflow.
_COLD = 1e-4


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: options of transformers', and OpenAI's biases and penalties of presence and frequency."""

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


class RepeatPenalties(tf.LogitsProcessor):
    """OpenAI's penalties on tokens that were generated before: ``presence`` once, and ``frequency`` for each time."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._start, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return a copy of the scores from which the penalties are taken."""
        new = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add(-1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class Sampler:
    """What draws the tokens of one sequence.

    Args:
        sampling: how tokens are drawn.
        key: number of the sequence within its request: the seed and the key make its random generator.
        prompt_length: how many tokens the prompt has, which OpenAI's penalties do not count.
    """

    def __init__(self, sampling: Sampling, key: int, prompt_length: int) -> None:
        s = sampling
        self.greedy, self.generator = s.temperature < _COLD, row_generator(s.seed, key)
        found: list[tf.LogitsProcessor] = []
        if s.repetition_penalty != 1:
            found.append(tf.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
        if s.presence_penalty or s.frequency_penalty:
            found.append(RepeatPenalties(prompt_length, s.presence_penalty, s.frequency_penalty))
        self._reads_tokens = bool(found)
        if s.logit_bias:
            found.append(tf.SequenceBiasLogitsProcessor({(token,): float(x) for token, x in s.logit_bias.items()}))
        self._processors = tf.LogitsProcessorList(found if self.greedy else [*found, *_warpers(s)])

    def scores(self, tokens: Sequence[int], log_probs: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """Return the scores to draw the next token from.

        Args:
            tokens: all so far, prompt included.
            log_probs: the ensemble's log-probabilities, in nats.
        """
        if not self._processors:
            return log_probs
        ids = torch.tensor([tokens if self._reads_tokens else []], dtype=torch.int64, device=log_probs.device)
        found: Tensor = self._processors(ids, log_probs[None])
        return found[0]


def _warpers(s: Sampling) -> list[tf.LogitsProcessor]:
    """Return transformers' own temperature and truncation, in its order."""
    found = [tf.TemperatureLogitsWarper(float(s.temperature))] if s.temperature != 1 else []
    found += [tf.TopKLogitsWarper(s.top_k)] if s.top_k else []
    found += [tf.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    return found + ([tf.MinPLogitsWarper(s.min_p)] if s.min_p is not None else [])


def next_tokens(samplers: Sequence[Sampler], scores: Float[Tensor, "B v"]) -> list[int]:
    """Draw one token per row of ``scores``; it depends on the row's scores and its sampler's generator alone."""
    tokens = scores.argmax(-1)
    drawing = [k for k, sampler in enumerate(samplers) if not sampler.greedy]
    if drawing:
        rows = torch.tensor(drawing, device=scores.device)
        tokens[rows] = draw(scores[rows], [samplers[k].generator for k in drawing])
    return tokens.tolist()
