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

# The largest probability behind a match, up to which each column of a table of weights goes.
_UP_TO = (0.1, 0.3, 0.5, 0.7, 0.85, 0.93, 0.97)
# What weights may be multiplied with, how likely each is beforehand, and the largest share that files ever claim.
_FACTORS, _MOST = np.array([0.02, 0.1, 0.3, 0.6, 1.0, 1.3]), 0.97
_PRIOR = np.array([0.1, 0.1, 0.1, 0.1, 0.3, 0.3])


@dataclass(frozen=True, eq=False)
class Scheme:
    """How files over one kind of symbols are matched and weighed (``python benchmarks/files.py weights`` fits it).

    Attributes:
        orders: the numbers of symbols that are matched.
        rows: from how many orders that matched each row of the table is for.
        weights: the table; what no order matched has weight 0.
        stand_in: the probability of each symbol by the model that files are compared with.
        fades: by how much what a symbol has shown counts less a symbol later.
        window: of how many symbols it is kept.
    """

    orders: tuple[int, ...]
    rows: tuple[int, ...]
    weights: Float64[np.ndarray, "r 8"]
    stand_in: float
    fades: float
    window: int

    def cell(self, match: Match, largest: float) -> tuple[int, int]:
        """Return the row and the column of the table that a place falls in, a row of -1 where nothing matched.

        Args:
            match: what followed there.
            largest: the largest probability behind it.
        """
        return int(np.searchsorted(self.rows, match.order, "right")) - 1, int(np.searchsorted(_UP_TO, largest))

    def weight(self, match: Match, largest: float) -> float:
        """Return the weight of files at a place, before their relevance; as of :meth:`cell`."""
        row, column = self.cell(match, largest)
        return 0.0 if row < 0 else float(self.weights[row, column])


TOKENS = Scheme(
    orders=(1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24),
    rows=(1, 3, 6),
    weights=np.array([
        [0.06, 0.04, 0.05, 0.07, 0.16, 0.20, 0.38, 0.64],
        [0.05, 0.09, 0.12, 0.18, 0.31, 0.46, 0.57, 0.77],
        [0.38, 0.23, 0.36, 0.40, 0.62, 0.81, 0.75, 0.91],
    ]),
    stand_in=0.5, fades=0.99, window=256,
)  # fmt: skip
BYTES = Scheme(
    orders=(*TOKENS.orders, 32, 48, 64),
    rows=(1, 5, 8, 11),
    weights=np.array([
        [0.50, 0.01, 0.01, 0.01, 0.02, 0.04, 0.07, 0.16],
        [0.35, 0.03, 0.02, 0.05, 0.04, 0.07, 0.15, 0.34],
        [0.50, 0.10, 0.08, 0.15, 0.20, 0.22, 0.37, 0.74],
        [0.50, 0.25, 0.32, 0.45, 0.71, 0.78, 0.84, 0.95],
    ]),
    stand_in=0.88, fades=0.998, window=512,
)  # fmt: skip


@dataclass
class Relevance:
    """How relevant files have proved for a text.

    Attributes:
        scheme: how they are weighed.
        seen: for each given symbol that was looked at, by its number, the log-likelihood of each factor.
        known: the relevance behind so many of them, as far as it was asked for: while a text is written it stays.
    """

    scheme: Scheme
    seen: dict[int, Float64[np.ndarray, " 6"]] = field(default_factory=dict)
    known: dict[int, float] = field(default_factory=dict)

    def see(self, number: int, prob: float, weight: float) -> None:
        """Take note of a symbol that was given.

        Args:
            number: its number in the text.
            prob: the probability that the files gave it.
            weight: their weight there.
        """
        share = np.minimum(_FACTORS * weight, _MOST)
        self.seen[number] = np.log((1 - share) * self.scheme.stand_in + share * prob)

    def unseen(self, count: int) -> list[int]:
        """Return which of the first ``count`` symbols are still to be seen, to tell the relevance behind them."""
        return [number for number in range(max(0, count - self.scheme.window), count) if number not in self.seen]

    def behind(self, count: int) -> float:
        """Return the relevance behind the first ``count`` symbols, of which the last ones were seen."""
        if count in self.known:
            return self.known[count]
        logs = np.log(_PRIOR)
        for number in range(max(0, count - self.scheme.window), count):
            logs = self.scheme.fades * logs + self.seen[number]
        posterior = np.exp(logs - logs.max())
        self.known[count] = float(posterior @ _FACTORS / posterior.sum())
        return self.known[count]

    def forked(self) -> Relevance:
        """Return another one that has seen the same."""
        return Relevance(self.scheme, dict(self.seen), dict(self.known))


def claim(weight: float, relevance: float) -> float:
    """Return the share that files claim, in [0, 0.97].

    Example:
        >>> claim(0.5, 0.6), claim(0.9, 1.3)
        (0.3, 0.97)
    """
    return min(weight * relevance, _MOST)
