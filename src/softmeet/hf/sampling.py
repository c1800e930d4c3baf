"""Sampling in which each sequence's tokens follow from a seed and its own distributions.

So they do not depend on the other sequences of the batch, nor on the order in which positions are computed. Row k of a
batch is sequence k's newest position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from softmeet.errors import InvalidInputError
from softmeet.noise import draw, noisy, require_seed


class RowSampler(LogitsProcessor):
    """A logits processor that draws each row's token, and forbids all other tokens.

    Put it after all other processors, those of temperature and truncation included. As only the drawn token stays
    possible, the sampling or search that follows has to choose it. The texts that it is first called with are prompts.

    Args:
        seed: the seed of the whole call, an integer.
        keys: an integer for each row of the batch (prompts times sequences of each); the noise of row k's position t,
            counted from its prompt's end, is ``gumbel(seed, keys[k], t, v)``. Rows with equal keys have equal noise.
    """

    def __init__(self, seed: int, keys: Sequence[int]) -> None:
        self._seed, self._keys = require_seed(seed), list(keys)
        self._start: int | None = None

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Draw a token for each row from softmax(scores), and return scores of 0 for it and -inf for all others."""
        if self._start is None:
            self._start = input_ids.shape[1]
        position = input_ids.shape[1] - self._start
        drawn = draw(scores, [(self._seed, key, position) for key in self._keys])
        _require_finite(scores.gather(-1, drawn[:, None]))
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn[:, None], 0.0)


class FreshNoise(LogitsProcessor):
    """Noise to draw tokens by without a seed: its own comes from torch's generator.

    What is drafted at a position and what the rule draws there have the same noise, so they agree wherever they can. As
    a processor it adds its noise to scores.

    Args:
        keeps: whether to keep the scores that the processor is called with.

    Attributes:
        given: these scores.
    """

    def __init__(self, *, keeps: bool = False) -> None:
        # Torch's own generator is used once, however much is drafted, so that what follows depends on its seed alone.
        self._seed = int(torch.randint(1 << 62, ()))
        self.given: tuple[Float[Tensor, "B v"], ...] = ()
        self._keeps = keeps

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Return scores of which each row's largest is at a token that is drawn from softmax(scores)."""
        if self._keeps:
            self.given += (scores,)
        found = self._noisy(scores, input_ids.shape[1])
        _require_finite(found.amax(-1))
        return found

    def draw(self, scores: Float[Tensor, "B v"], position: int) -> Int[Tensor, " B"]:
        """Draw each row's token from softmax(scores)."""
        best, drawn = self._noisy(scores, position).max(-1)
        _require_finite(best)
        return drawn

    def _noisy(self, scores: Float[Tensor, "B v"], position: int) -> Float[Tensor, "B v"]:
        return noisy(scores, [(self._seed, row, position) for row in range(len(scores))])


def _require_finite(best: Tensor) -> None:
    """Raise InvalidInputError if a row's best score is not finite, so that no token can be drawn."""
    if not bool(best.isfinite().all()):
        raise InvalidInputError(
            "expected scores of which at least one is finite and none is NaN or +inf, to draw a token from: processors "
            "of scores left none; allow more tokens"
        )


class _ToldOfScores(StoppingCriteriaList):
    """Stopping criteria that see the scores which tokens were drawn from."""

    def __init__(self, criteria: StoppingCriteriaList, noise: FreshNoise) -> None:
        super().__init__(criteria)
        self._noise = noise

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        """Ask every criterion."""
        return super().__call__(input_ids, self._noise.given, **options)


def one_by_one(loop: Callable[..., Any], input_ids: Int[Tensor, "B t"], arguments: dict[str, Any]) -> Any:
    """Choose tokens by transformers' loop, in which noise draws them.

    That takes less time than torch.multinomial (``benchmarks/draws.py``), and torch's generator in one state gives one
    text, whether tokens are drafted or not.

    Args:
        loop: ``GenerationMixin._sample`` of an ensemble.
        input_ids: the prompts.
        arguments: the loop's others.
    """
    config = copy(arguments["generation_config"])
    # An assistant's scores are read by the loop that it drafts for.
    if not config.do_sample or config.is_assistant:
        return loop(input_ids, **arguments)
    # The token that is drawn has the largest score.
    config.do_sample = False
    if arguments["call_options"].row_sampler is not None:
        return loop(input_ids, **arguments | {"generation_config": config})
    scored = config.return_dict_in_generate and config.output_scores
    noise = FreshNoise(keeps=scored)
    changed: dict[str, Any] = {
        "generation_config": config,
        "logits_processor": LogitsProcessorList([*arguments["logits_processor"], noise]),
    }
    if scored:
        changed["stopping_criteria"] = _ToldOfScores(arguments["stopping_criteria"], noise)
    found = loop(input_ids, **arguments | changed)
    if scored:
        found.scores = noise.given[: len(found.scores)]
    return found


def require_reproducible(drawn: bool, seed: int | None, options: Mapping[str, Any]) -> None:
    """Raise InvalidInputError where a call's tokens cannot be the same every time, to the last bit.

    Args:
        drawn: whether tokens are drawn.
        seed: the call's, or None.
        options: the call's other options, of which ``token_seconds`` and ``speculate`` are refused.
    """
    if drawn and seed is None:
        raise InvalidInputError("expected a seed where tokens are drawn and have to be reproducible, got none")
    if options.get("speculate"):
        raise InvalidInputError(
            "expected no speculation where tokens have to be reproducible: rounding depends on how many tokens members "
            "read at once"
        )
    if options.get("token_seconds") is not None:
        raise InvalidInputError(
            "expected no limit on a token's seconds where tokens have to be reproducible: what is reached in that time "
            "depends on what else the machine does"
        )
