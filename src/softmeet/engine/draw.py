"""``Draw``: how the next token of a text is chosen, on every road.

Processors change the scores of tokens, as those of transformers do. Then the token of the largest score is taken, or of
the largest sum of a score and its noise, which draws from softmax(scores) (:mod:`softmeet.noise`). As the noise depends
on a seed, the text's own number and the position alone, so does what is drawn from given scores: not on the other texts
of a batch, nor on the order in which positions are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import transformers as tf
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.engine.masking import Mask, Structured
from softmeet.engine.processors import NoEndBefore, RepeatPenalties
from softmeet.errors import InvalidInputError
from softmeet.noise import noisy, require_seed

# The seed, sequence and position of a token's noise.
Place: TypeAlias = tuple[int, int, int]
# Below this temperature the most probable token is taken: dividing by it could overflow fp32.
_COLD = 1e-4


def choose(scores: Float[Tensor, "B v"], noise: Sequence[Place | None]) -> Int[Tensor, " B"]:
    """Return each row's token: drawn from softmax(scores) by its noise, or without noise that of the largest score.

    Args:
        scores: (B, v), in nats; -inf for what cannot come.
        noise: for each row the seed, sequence and position of its noise, as of :func:`softmeet.noise.gumbel`, or None.

    Raises:
        InvalidInputError: if tokens are drawn, and a row has no finite score, or NaN or +inf.

    Example:
        >>> choose(torch.tensor([[0.1, 0.7], [0.9, 0.2]]), [None, None])
        tensor([1, 0])
    """
    if not any(noise):
        return scores.argmax(-1)
    best, drawn = noisy(scores, noise).max(-1)
    if not bool(best.isfinite().all()):
        raise InvalidInputError(
            "expected scores of which at least one is finite and none is NaN or +inf, to draw a token from: processors "
            "of scores left none; allow more tokens"
        )
    return drawn


class Noise:
    """The noise by which the tokens of B texts are drawn.

    Args:
        seed: of 64 bits, an integer.
        keys: an integer for each text; the noise of text k's position t is ``gumbel(seed, keys[k], t, v)``. Texts with
            equal keys have equal noise.
        start: the length of a text at its position 0; None for the length at which a token is drawn first.

    Raises:
        InvalidInputError: if the seed is none.

    Example:
        >>> Noise(3, [0, 1]).at(7), Noise(3, [0], start=5).at(7)
        ([(3, 0, 0), (3, 1, 0)], [(3, 0, 2)])
    """

    def __init__(self, seed: int, keys: Sequence[int], start: int | None = None) -> None:
        self._seed, self._keys, self._start = require_seed(seed), list(keys), start

    @classmethod
    def unseeded(cls, count: int) -> Noise:
        """Return noise for so many texts that depends on torch's own generator, which is used once."""
        return cls(int(torch.randint(1 << 62, ())), range(count), 0)

    def at(self, length: int) -> list[Place]:
        """Return the seed, sequence and position of each text's noise for the token behind its first ``length``."""
        if self._start is None:
            self._start = length
        return [(self._seed, key, length - self._start) for key in self._keys]


class Draw:
    """How the next tokens of one text, or of several of one length, are chosen.

    Args:
        processors: called one after the other with the texts, (B, t), and scores, (B, v); each returns new scores.
        noise: to draw tokens by; None to take the token of the largest score.
        looks: at how many of a text's last tokens processors look at most; None for all.
    """

    def __init__(
        self,
        processors: Sequence[Callable[[Tensor, Tensor], Tensor]],
        noise: Noise | None,
        looks: int | None = None,
    ) -> None:
        self._processors, self._noise, self._looks = list(processors), noise, looks

    def scores(self, ids: Int[Tensor, "B t"], log_probs: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return the scores by which the token behind each text is chosen.

        Args:
            ids: the texts so far.
            log_probs: of the next token, in nats.

        Raises:
            SoftmeetError: that of a processor, such as of a structure that is too complex to go on.
        """
        for processor in self._processors:
            log_probs = processor(ids, log_probs)
        return log_probs

    def behind(self, text: Sequence[int], log_probs: Float[Tensor, "1 v"]) -> Float[Tensor, "1 v"]:
        """Return what :meth:`scores` does of one text, of which processors are told no more than they look at."""
        if not self._processors:
            return log_probs
        read = text if self._looks is None else text[-self._looks :]
        return self.scores(torch.tensor([read], dtype=torch.int64, device=log_probs.device), log_probs)

    def noise(self, length: int) -> Sequence[Place | None]:
        """Return each text's noise for the token behind its first ``length``, for :func:`choose`."""
        return [None] if self._noise is None else self._noise.at(length)


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

    @property
    def is_greedy(self) -> bool:
        """Whether the token with the largest score is taken instead of a draw; temperature and truncation are idle."""
        return self.temperature < _COLD

    def begin(self, key: int, prompt_length: int, ends: Sequence[int]) -> Draw:
        """Return how the tokens of one sequence are chosen.

        Args:
            key: the sequence's number within its request, from 0.
            prompt_length: the number of prompt tokens, which ``min_tokens``, presence and frequency penalties do not
                count.
            ends: the ids of the tokens that end the sequence.
        """
        found: list[tf.LogitsProcessor] = []
        if self.mask is not None:
            # Before truncation, which is to count only tokens that are allowed.
            found.append(Structured(self.mask, prompt_length))
        if self.repetition_penalty != 1:
            found.append(tf.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.presence_penalty or self.frequency_penalty:
            found.append(RepeatPenalties(prompt_length, self.presence_penalty, self.frequency_penalty))
        if self.min_tokens and ends:
            found.append(NoEndBefore(prompt_length + self.min_tokens, ends))
        looks = None if found else 1
        if self.logit_bias:
            found.append(tf.SequenceBiasLogitsProcessor({(token,): float(x) for token, x in self.logit_bias.items()}))
        if self.is_greedy:
            return Draw(found, None, looks)
        return Draw([*found, *self._warpers()], Noise(self.seed, [key], prompt_length), looks)

    def _warpers(self) -> list[tf.LogitsProcessor]:
        """Return transformers' processors for temperature and truncation (top-k, top-p, min-p), in its order."""
        found = [tf.TemperatureLogitsWarper(float(self.temperature))] if self.temperature != 1 else []
        found += [tf.TopKLogitsWarper(self.top_k)] if self.top_k else []
        found += [tf.TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return found + ([tf.MinPLogitsWarper(self.min_p)] if self.min_p is not None else [])
