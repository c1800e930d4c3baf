"""Sequential Monte Carlo: draw from the ensemble of whole texts, in place of an average of next tokens."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from softmeet.decoders.base import Decoder, Decoding, Texts, ToWrite, WeightedText, refuse_given
from softmeet.errors import InvalidInputError
from softmeet.rules.gates import that_closes
from softmeet.rules.registry import all_rules
from softmeet.rules.settings import Settings


class Particles(Decoder):
    """Draw a text from π(x) ∝ f(P_1(x), …, P_n(x)), over texts that have ended or have T symbols.

    P_i(x) is member i's probability of the whole text, its end included, and f the function by which the rule combines
    probabilities: Π P_i^{w_i} of ``logit-mean``, Σ w_i P_i of ``prob-mean``, that of ``power-mean``, ``pointwise-max``
    or ``pointwise-min``. An average of next tokens draws from something else: it is normalised at each token, so that
    members pay nothing for beginnings that only one of them can end well. T, the limit in symbols, is part of the
    definition.

    ``n`` texts grow together. Each text x is extended by a symbol s from q(s | x) ∝ f(P_i(xs)), and its weight is
    multiplied by Σ_s f(P_i(xs)) / f(P_i(x)). Where the effective number of texts falls below ``ess`` times n, texts are
    drawn anew by their weights (systematic resampling), those that have ended, too. The mean weight Ẑ estimates Z = Σ_x
    f(P_i(x)) without bias, and so does Ẑ times the indicator that text x is drawn estimate Z π(x): what is drawn tends
    to π as n grows.

    Over tokens it is exact for what the members predict; over bytes for what they predict at ``prune=0``. From Chan et
    al. (Ensembling language models with sequential Monte Carlo, arXiv:2603.05432), whose code, in genlm-control, is
    over the bytes of two models.
    """

    n: int = Field(default=16, ge=1, le=4096)
    """The number of texts that grow together."""
    ess: float = Field(default=0.5, ge=0, le=1)
    """The share of n below which the effective number of texts makes them be drawn anew; 0 for never."""
    utf8: bool = False
    """Over bytes, whether texts that do not begin as UTF-8 does are left out of the definition."""

    name = "particles"
    summary = "a draw from the ensemble of whole texts, by sequential Monte Carlo"
    reference = "https://arxiv.org/abs/2603.05432"

    def rows(self, members: int) -> int:
        """Return how many texts grow together."""
        return self.n

    def require(self, settings: Settings) -> None:
        """Check that the rule is a function of probabilities, and nothing else changes what is drawn.

        Raises:
            InvalidInputError: if not.
        """
        one = torch.ones(1, dtype=torch.float64)
        if settings.rule.aggregate(one[:, None], one) is None:
            names = [rule.name for rule in all_rules() if rule.aggregate(one[:, None], one) is not None]
            without = "it without its options, or " if settings.rule.name in names else ""
            raise InvalidInputError(
                f"the decoder particles needs a rule that combines the probabilities of whole texts, which "
                f"{settings.rule} does not: choose {without}{' or '.join(names)}"
            )
        refuse_given(
            self,
            {
                f"the gate {settings.gate}": that_closes(settings.gate) is not None,
                "rule_temperature": settings.rule_temperature != 1,
            },
        )

    def decode(self, texts: Texts, job: ToWrite) -> list[Decoding]:
        """Write n texts behind each of B prompts, and choose one of each by weight."""
        run = _Run(texts, job, self)
        for length in range(1, job.most + 1):
            run.extend()
            if length < job.most and run.live:
                run.draw_anew(self.ess * self.n)
            if not run.live:  # drawn anew, all may have ended
                break
        return run.found()


class _Run:
    """B · n texts that grow: of each member i log P_i, (members, B · n), and of each text the logarithm of its weight.

    Args:
        texts: the texts.
        job: what is to be written.
        options: the decoder's.
    """

    def __init__(self, texts: Texts, job: ToWrite, options: Particles) -> None:
        self._texts, self._job, self._n, self._utf8 = texts, job, options.n, options.utf8
        self._weights = torch.tensor(job.settings.weights, dtype=torch.float64)
        self._log_p = torch.zeros(len(self._weights), texts.rows, dtype=torch.float64)
        self._log_w = self._value(self._log_p)
        self._ended = torch.zeros(texts.rows, dtype=torch.bool)

    def _value(self, log_p: Float[Tensor, m * b]) -> Float[Tensor, "*b"]:
        """Return log f of the members' log-probabilities of texts."""
        found = self._job.settings.rule.aggregate(log_p, self._weights)
        assert found is not None, "the rule was checked"
        return found

    @property
    def live(self) -> list[int]:
        """The rows of texts that can be extended."""
        return (~self._ended & ~self._log_w.isneginf()).nonzero().flatten().tolist()

    def extend(self) -> None:
        """Draw a symbol for every text that can be extended, and weigh it."""
        rows = self.live
        log_p = self._log_p[:, rows, None] + self._texts.log_probs(rows)
        scores = self._value(log_p)
        if self._utf8 and (allowed := self._texts.allowed(rows)) is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        total = scores.logsumexp(-1)
        self._log_w[rows] += total - self._value(self._log_p[:, rows])
        going = ~total.isneginf()
        kept = going.nonzero().flatten()
        if not len(kept):
            return
        shares = (scores[kept] - total[kept, None]).exp()
        drawn = torch.multinomial(shares, 1, generator=self._job.generator)
        on = [rows[k] for k in kept.tolist()]
        self._log_p[:, on] = log_p[:, kept].gather(-1, drawn.expand(len(log_p), -1, -1)).squeeze(-1)
        self._texts.add(on, drawn.flatten().tolist())
        ends = [row for row, symbol in zip(on, drawn.flatten().tolist(), strict=True) if symbol in self._job.ends]
        self._ended[ends] = True
        self._texts.finish(ends)

    def draw_anew(self, least: float) -> None:
        """Draw the texts of each prompt anew by weight, where their effective number is below ``least``."""
        log_w = self._log_w.view(-1, self._n)
        log_mean = log_w.logsumexp(-1) - math.log(self._n)
        shares = (log_w - log_w.logsumexp(-1, keepdim=True)).exp()
        poor = ~log_mean.isneginf() & (1 / shares.square().sum(-1) < least)
        groups = poor.nonzero().flatten()
        if not len(groups):
            return
        starts = torch.rand(len(groups), 1, dtype=torch.float64, generator=self._job.generator)
        sources = (systematic(shares[groups], starts) + self._n * groups[:, None]).flatten()
        rows = (torch.arange(self._n) + self._n * groups[:, None]).flatten()
        self._texts.replace(rows.tolist(), sources.tolist())
        self._log_p[:, rows], self._ended[rows] = self._log_p[:, sources], self._ended[sources]
        self._log_w[rows] = log_mean[groups].repeat_interleave(self._n)

    def found(self) -> list[Decoding]:
        """Return the texts behind each prompt, and choose one of each by weight."""
        found = list[Decoding]()
        for start in range(0, self._texts.rows, self._n):
            log_w = self._log_w[start : start + self._n]
            every = tuple(self._text(start + k) for k in range(self._n))
            log_z, chosen = float(log_w.logsumexp(-1)) - math.log(self._n), None
            if not math.isinf(log_z):
                chosen = int(torch.multinomial(log_w.softmax(-1), 1, generator=self._job.generator))
            found.append(Decoding(every, chosen, log_z))
        return found

    def _text(self, row: int) -> WeightedText:
        log_probs = tuple(self._log_p[:, row].tolist())
        return WeightedText(self._texts.symbols(row), bool(self._ended[row]), float(self._log_w[row]), log_probs)


def systematic(shares: Float[Tensor, "B n"], starts: Float[Tensor, "B 1"]) -> Int[Tensor, "B n"]:
    """Draw n numbers below n by shares that sum to 1, each between rounding down and up of n times its share.

    Args:
        shares: the shares.
        starts: of each row a number from 0 to 1, uniformly distributed.

    Example:
        >>> systematic(torch.tensor([[0.5, 0.0, 0.25, 0.25]]), torch.tensor([[0.5]]))
        tensor([[0, 0, 2, 3]])
    """
    n = shares.shape[-1]
    bounds = shares.cumsum(-1)
    places = (torch.arange(n, dtype=shares.dtype) + starts) / n * bounds[:, -1:]
    # Rounding must not choose what has share 0.
    last = n - 1 - (shares > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.searchsorted(bounds, places, right=True).minimum(last)
