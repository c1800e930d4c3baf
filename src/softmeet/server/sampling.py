"""From a row's distribution to its next token, as ``softmeet generate`` and the OpenAI API have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from softmeet.hf.sampling import draw, row_generator

# Colder than this, the most probable token is all that is left, and fp32 would overflow.
_COLD = 1e-4


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Names and meanings are transformers' or, of biases and the two penalties, OpenAI's.

    ``seed`` and ``key`` name the row's own generator; ``key`` counts the choices of a request.
    """

    seed: int
    key: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < _COLD


class Repeats(LogitsProcessor):
    """Takes ``presence`` and, each time, ``frequency`` from the scores of tokens that were generated before."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._start, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """A penalised copy."""
        new = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add(-1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class Sampler:
    """Draws one row's tokens.

    Args:
        sampling: how.
        prompt: the row's prompt; what comes after it is what the penalties of OpenAI's count.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        s = sampling
        self.greedy, self.generator = s.greedy, row_generator(s.seed, s.key)
        readers: list[LogitsProcessor] = []
        if s.repetition_penalty != 1:
            readers.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
        if s.presence_penalty or s.frequency_penalty:
            readers.append(Repeats(len(prompt), s.presence_penalty, s.frequency_penalty))
        self._reads = bool(readers)
        biases = {(token,): float(bias) for token, bias in s.logit_bias.items()}
        others = [SequenceBiasLogitsProcessor(biases)] if biases else []
        self._processors = LogitsProcessorList([*readers, *others, *([] if s.greedy else _warpers(s))])

    def scores(self, tokens: Sequence[int], log_probs: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """What the token is to be drawn from, given all tokens so far, prompt included."""
        if not self._processors:
            return log_probs
        ids = torch.tensor([tokens if self._reads else []], dtype=torch.int64, device=log_probs.device)
        found: Tensor = self._processors(ids, log_probs[None])
        return found[0]


def _warpers(s: Sampling) -> list[LogitsProcessor]:
    """Transformers' own, in its order."""
    found = [TemperatureLogitsWarper(float(s.temperature))] if s.temperature != 1 else []
    found += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    found += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    return found + ([MinPLogitsWarper(s.min_p)] if s.min_p is not None else [])


def next_tokens(samplers: Sequence[Sampler], scores: Float[Tensor, "B v"]) -> list[int]:
    """One token per row; a row's depends on its scores and its generator alone."""
    tokens = scores.argmax(-1)
    drawing = [k for k, sampler in enumerate(samplers) if not sampler.greedy]
    if drawing:
        rows = torch.tensor(drawing, device=scores.device)
        tokens[rows] = draw(scores[rows], [samplers[k].generator for k in drawing])
    return tokens.tolist()
