"""How sure an answer is: its log-probability, the entropy, and how far the members disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor, StoppingCriteria

from softmeet.engine.recorder import Recorder
from softmeet.evaluation.scores import disagreement
from softmeet.rules.solution import Solution


@dataclass(frozen=True)
class Doubt:
    """How sure an answer is, in nats; of a text, means over its tokens (over bytes: bytes).

    Attributes:
        log_prob: the log-probability of what was chosen: an option among all, or a token.
        entropy: of the distribution from which it was chosen.
        disagreement: the mean over members i of KL(p̂_i‖m), m the mean of the members' distributions (Jensen-Shannon);
            None of a single member. Under the gate ``unsure``, at the tokens at which all ran.
    """

    log_prob: float
    entropy: float
    disagreement: float | None = None

    def measures(self) -> dict[str, float]:
        """Return what is known, by name, each larger the less sure the answer is."""
        found = {"log-probability": -self.log_prob, "entropy": self.entropy, "disagreement": self.disagreement}
        return {name: value for name, value in found.items() if value is not None}


def of_options(ours: Sequence[float], members: Sequence[Sequence[float]]) -> Doubt:
    """Return how sure the choice of the option with the largest score is.

    Args:
        ours: the score of each option, by which they are compared, in nats; its softmax is the distribution.
        members: each member's own scores of them.

    Example:
        >>> doubt = of_options([0.0, -1.0], [[0.0, -1.0], [0.0, -1.0]])
        >>> round(doubt.log_prob, 3), round(doubt.entropy, 3), doubt.disagreement
        (-0.313, 0.582, 0.0)
    """
    log_p = torch.tensor([ours, *members], dtype=torch.float64).log_softmax(-1)
    apart = float(disagreement(log_p[1:, None])) if len(members) > 1 else None
    return Doubt(float(log_p[0].max()), float(_entropy(log_p[0])), apart)


def _entropy(log_p: Float[Tensor, "*B v"]) -> Float[Tensor, "*B"]:
    entropy: Tensor = torch.special.entr(log_p.exp()).sum(-1)
    return entropy


class Watch(Recorder):
    """A recorder that keeps how sure each token of a batch of texts is, for one call of ``generate``.

    Pass it as ``recorder=``, :attr:`scores` among the processors and :attr:`tokens` among the stopping criteria.

    Attributes:
        scores: a processor that looks at the ensemble's distributions.
        tokens: a stopping criterion that looks at what was chosen, and stops nothing.
    """

    needs_solutions = False

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.tokens = _Scores(self), _Tokens(self)
        self._last = torch.zeros(0, 0)
        # How far the members disagree at the rows of the pass that is under way, by row.
        self._apart = dict[int, float]()
        # By the number of columns before a token: of each row (log-probability, entropy, disagreement).
        self._found = dict[int, Float[Tensor, "B 3"]]()

    def add(self, solution: Solution, log_probs: Float[Tensor, "n B v"]) -> None:
        """Keep how far the members disagree at the rows of one pass."""
        super().add(solution, log_probs)
        self._keep(log_probs)

    def add_average(self, logits: Sequence[Float[Tensor, "B _"]]) -> None:
        """Keep how far the members disagree at the rows of an average."""
        super().add_average(logits)
        v = max(own.shape[-1] for own in logits)
        padded = [pad(own.to(logits[0]), (0, v - own.shape[-1]), value=-math.inf) for own in logits]
        self._keep(torch.stack(padded).log_softmax(-1) if len(logits) > 1 else logits[0][None])

    def _keep(self, log_probs: Float[Tensor, "n B v"]) -> None:
        rows = log_probs.shape[1]
        apart = disagreement(log_probs).tolist() if len(log_probs) > 1 else [math.nan] * rows
        start = len(self._apart)
        self._apart |= dict(zip(self.came(rows) or range(start, start + rows), apart, strict=True))

    def look(self, column: int, log_p: Float[Tensor, "B v"]) -> None:
        """Keep the distributions from which the tokens of a column are chosen, of the texts that go on."""
        rows, found = list(self._apart), torch.full((len(log_p), 3), math.nan, dtype=torch.float64)
        self._last = log_p.log_softmax(-1)
        found[rows, 1] = _entropy(self._last).double().cpu()[rows]
        found[rows, 2] = torch.tensor(list(self._apart.values()), dtype=torch.float64)
        self._found[column], self._apart = found, {}

    def settle(self, column: int, chosen: Int[Tensor, " B"]) -> None:
        """Keep the log-probabilities of the tokens of a column."""
        own = self._last.gather(-1, chosen[:, None].to(self._last.device)).squeeze(-1).double().cpu()
        found = self._found[column]
        found[:, 0] = torch.where(found[:, 1].isnan(), found[:, 1], own)

    def doubts(self) -> list[Doubt]:
        """Return how sure each text of the batch is."""
        every = torch.stack([self._found[column] for column in sorted(self._found)], 1)
        return [
            Doubt(log_prob, entropy, None if math.isnan(apart) else apart)
            for log_prob, entropy, apart in every.nanmean(1).tolist()
        ]


class _Scores(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        """Look at the scores, and return them as they are."""
        self._watch.look(input_ids.shape[1], scores)
        return scores


class _Tokens(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, input_ids: Int[Tensor, "B t"], scores: Any, **kwargs: Any) -> Bool[Tensor, " B"]:
        """Look at the newest tokens, and end nothing."""
        self._watch.settle(input_ids.shape[1] - 1, input_ids[:, -1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
