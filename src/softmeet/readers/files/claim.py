"""How much of the probability mass files claim: by how sure their matches are, and by how relevant they have proved.

A place's weight goes by how many orders matched and by the largest probability behind the match. It is multiplied with
the relevance of the files for the text: the posterior mean of a few factors, by how well the files, so weighted, would
have predicted the symbols that were given, against a model that gives each of them one stand-in probability. What was
drawn counts for nothing, as a text that the files have written would prove them right.

In place of the stand-in the rule's own predictions could stand, which would have to be read for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64

from softmeet.readers.files.matches import Match

# Weights by the number of orders that matched (none, from 1, 3 and 6) and by the largest probability, up to which.
_FROM = (1, 3, 6)
_UP_TO = (0.1, 0.3, 0.5, 0.7, 0.85, 0.93, 0.97)
WEIGHTS = np.array([
    [0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00],
    [0.06, 0.04, 0.05, 0.07, 0.16, 0.20, 0.38, 0.64],
    [0.05, 0.09, 0.12, 0.18, 0.31, 0.46, 0.57, 0.77],
    [0.38, 0.23, 0.36, 0.40, 0.62, 0.81, 0.75, 0.91],
])  # fmt: skip
# What weights may be multiplied with, how likely each is beforehand, and the largest share that files ever claim.
_FACTORS, _MOST = np.array([0.02, 0.1, 0.3, 0.6, 1.0, 1.3]), 0.97
_PRIOR = np.array([0.1, 0.1, 0.1, 0.1, 0.3, 0.3])
# The stand-in probability, by how much what was seen counts less a symbol later, and of how many symbols it is kept.
_STAND_IN, _FADES, _WINDOW = 0.35, 0.98, 256


def cell(match: Match, largest: float) -> tuple[int, int]:
    """Return the row and the column of the table of weights that a place falls in.

    Args:
        match: what followed there.
        largest: the largest probability behind it.
    """
    return int(np.searchsorted(_FROM, match.order, "right")), int(np.searchsorted(_UP_TO, largest))


def weight(match: Match, largest: float) -> float:
    """Return the weight of files at a place, before their relevance; as of :func:`cell`."""
    return float(WEIGHTS[cell(match, largest)])


@dataclass
class Relevance:
    """How relevant files have proved for a text.

    Attributes:
        seen: for each given symbol that was looked at, by its number, the log-likelihood of each factor.
    """

    seen: dict[int, Float64[np.ndarray, " 6"]] = field(default_factory=dict)

    def see(self, number: int, prob: float, weight: float) -> None:
        """Take note of a symbol that was given.

        Args:
            number: its number in the text.
            prob: the probability that the files gave it.
            weight: their weight there.
        """
        share = np.minimum(_FACTORS * weight, _MOST)
        self.seen[number] = np.log((1 - share) * _STAND_IN + share * prob)

    def unseen(self, count: int) -> list[int]:
        """Return which of the first ``count`` symbols are still to be seen, to tell the relevance behind them."""
        return [number for number in range(max(0, count - _WINDOW), count) if number not in self.seen]

    def behind(self, count: int) -> float:
        """Return the relevance behind the first ``count`` symbols, of which the last ones were seen."""
        logs = np.log(_PRIOR)
        for number in range(max(0, count - _WINDOW), count):
            logs = _FADES * logs + self.seen[number]
        posterior = np.exp(logs - logs.max())
        return float(posterior @ _FACTORS / posterior.sum())

    def forked(self) -> Relevance:
        """Return another one that has seen the same."""
        return Relevance(dict(self.seen))


def claim(weight: float, relevance: float) -> float:
    """Return the share that files claim, in [0, 0.97].

    Example:
        >>> claim(0.5, 0.6), claim(0.9, 1.3)
        (0.3, 0.97)
    """
    return min(weight * relevance, _MOST)
