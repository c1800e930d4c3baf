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

from softmeet.engine.draw import Noise
from softmeet.errors import InvalidInputError


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
        self.noise = Noise(seed, keys)

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Draw a token for each row from softmax(scores), and return scores of 0 for it and -inf for all others."""
        drawn = self.noise.draw(scores, input_ids.shape[1])
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn[:, None], 0.0)


class _Unseeded(RowSampler):
    """A row sampler whose noise comes from torch's generator, and which may keep the scores that it is called with."""

    def __init__(self, rows: int, *, keeps: bool) -> None:
        self.noise, self._keeps = Noise.unseeded(rows), keeps
        self.given: tuple[Float[Tensor, "B v"], ...] = ()

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Draw as :class:`RowSampler` does."""
        self.given += (scores,) * self._keeps
        return super().__call__(input_ids, scores)


class _ToldOfScores(StoppingCriteriaList):
    """Stopping criteria that see the scores which tokens were drawn from."""

    def __init__(self, criteria: StoppingCriteriaList, drawn: _Unseeded) -> None:
        super().__init__(criteria)
        self._drawn = drawn

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        """Ask every criterion."""
        return super().__call__(input_ids, self._drawn.given, **options)


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
    drawn = _Unseeded(len(input_ids), keeps=scored)
    changed: dict[str, Any] = {
        "generation_config": config,
        "logits_processor": LogitsProcessorList([*arguments["logits_processor"], drawn]),
    }
    if scored:
        changed["stopping_criteria"] = _ToldOfScores(arguments["stopping_criteria"], drawn)
    found = loop(input_ids, **arguments | changed)
    if scored:
        found.scores = drawn.given[: len(found.scores)]
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
