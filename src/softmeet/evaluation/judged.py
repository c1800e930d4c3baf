"""What a text says about members and their combinations: gains over the best member, and the verdict.

Candidates are fitted without each fold of the documents, and judged on it. Where a candidate is chosen among several,
it is chosen on the other folds too, so that a gain is what the choice brings on documents that it was not made by. The
single member that ensembles are compared with is chosen on the whole text: it is, if anything, too good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.evaluation.candidates import Candidate
from softmeet.evaluation.fit import Fitted
from softmeet.evaluation.folds import best_elsewhere
from softmeet.evaluation.intervals import Clusters, Difference, clusters, paired
from softmeet.evaluation.perplexity import distinct_names
from softmeet.evaluation.scores import Evaluation
from softmeet.rules.pools import PowerMean
from softmeet.rules.registry import DEFAULT
from softmeet.rules.settings import rule_of
from softmeet.rules.values import POOLS

# Fewer tokens, or documents, are too few for a verdict to be relied on.
_FEW_TOKENS, _FEW_DOCUMENTS = 1000, 10
# A document of which a model needs fewer bits a byte reads like one that it has learnt by heart.
_BY_HEART = 0.3
# Thresholds of the gate ``unsure`` that are tried; the share of an average's gain that a gated one has to keep, and
# the share of its time that it may take.
_THRESHOLDS = (0.5, 0.7, 0.9)
_KEPT, _CHEAPER = 0.9, 0.8


@dataclass(frozen=True)
class Gated:
    """An average behind the gate ``unsure``: one member answers alone where it is sure.

    Attributes:
        member: the number of the member that runs at every token.
        threshold: from which probability of its most probable token on it answers alone.
        alone: the share of positions at which it does.
        nats: the losses that judge it, (N,), with the member's own probabilities where it answers alone.
    """

    member: int
    threshold: float
    alone: float
    nats: Float[Tensor, " N"]

    @property
    def gate(self) -> str:
        """The gate as the setting takes it, for an ensemble that has the member first."""
        return f"unsure:{self.threshold:g}"


@dataclass
class Judged:
    """What a text says about the candidates of a fit by folds: losses in bits a byte, gains over the best member.

    Attributes:
        ensemble: the members.
        fitted: the fit, by folds.
        times: the milliseconds that each member takes to write a byte alone.
        unfitted_meet: scores of ``meet`` at trust 0.3 and of its pool, both with equal weights, at some positions; None
            where ``meet`` cannot be.
        too_long: the seconds that trying ``meet`` on the whole text would take, where that is why it was not; else
            None.
        found: scores of members and candidates.
        fold: the fold of each position, (N,), int64.
        names: the members' names.
        within: the clusters of positions, for intervals.
        documents: the clusters of positions by document, whatever their number.
        bytes: that each position adds to the text, (N,).
        best: the member of the least loss, as it is or with a fitted temperature.
        base: its losses, (N,), whichever are less.
    """

    ensemble: Ensemble
    fitted: Fitted
    times: Sequence[float]
    unfitted_meet: Evaluation | None = None
    too_long: float | None = None

    def __post_init__(self) -> None:
        """Name the members, and find the best one alone, as it is or with a fitted temperature."""
        assert self.fitted.fold is not None, "advice is by folds"
        self.found, self.fold, self.names = self.fitted.test, self.fitted.fold, distinct_names(self.ensemble)
        self.within, self.bytes = self.fitted.parts["test"].within, self.found.positions.sizes
        self.documents = Clusters(self.found.positions.document, "documents")
        alone = {}
        for name, own in zip(self.names, self.fitted.candidates, strict=False):
            alone[name] = min(self.found.members[name].nats, self._nats(own), key=torch.sum)
        self.best = min(alone, key=lambda name: alone[name].sum().item())
        self.base = alone[self.best]

    def _nats(self, candidate: Candidate) -> Float[Tensor, " N"]:
        return self.found.choices[candidate.label].nats

    def bits(self, nats: Float[Tensor, " N"]) -> float:
        """Return losses in nats as bits a byte."""
        return nats.sum().item() / math.log(2) / int(self.bytes.sum())

    def gain(self, nats: Float[Tensor, " N"], over: Float[Tensor, " N"] | None = None) -> Difference:
        """Return what losses in nats are below others, by default those of the best member, in bits a byte."""
        worse = self.base if over is None else over
        return paired(worse / math.log(2), nats / math.log(2), self.within, self.bytes)

    def elsewhere(self, candidates: Sequence[Candidate]) -> Float[Tensor, " N"]:
        """Return the losses of whichever candidate is best on the other folds."""
        return best_elsewhere({candidate.name: self._nats(candidate) for candidate in candidates}, self.fold)

    @property
    def averages(self) -> list[Candidate]:
        """The fitted averages of all members."""
        return [own for own in self.fitted.candidates if own.name in (*POOLS, PowerMean.name)]

    @property
    def worthwhile(self) -> list[Candidate]:
        """The averages, but without the power mean unless it is shown to be better than both of its ends."""
        every, ends = self.averages, [own for own in self.averages if own.name in POOLS]
        return every if every and self.gain(self.elsewhere(every), self.elsewhere(ends)).low > 0 else ends

    @property
    def meets(self) -> list[Candidate]:
        """The candidates that are ``meet``, one for each trust that was tried; none if it was not."""
        return [own for own in self.fitted.candidates if rule_of(own.settings["rule"]).tilts_pool]

    def best_of(self, candidates: Sequence[Candidate]) -> Candidate:
        """Return the candidate of the least loss."""
        return min(candidates, key=lambda own: self._nats(own).sum().item())

    def chosen(self) -> tuple[str, Candidate, Float[Tensor, " N"] | None, Gated | None]:
        """Return (the verdict, its candidate, the losses that judge it, its gate if it has one).

        The losses are None for a single member without an ensemble beside it.
        """
        best = self.fitted.candidates[self.names.index(self.best)]
        averages = self.worthwhile
        if not averages:
            return "single", best, None, None
        averaged = self.elsewhere(averages)
        if self.meets:
            every = self.elsewhere([*averages, *self.meets])
            if self.gain(every, averaged).low > 0 and self.gain(every).low > 0:
                return DEFAULT, self.best_of(self.meets), every, None
        if not self.gain(averaged).low > 0:
            return "single", best, averaged, None
        if gated := self.gated(averaged):
            return "gate", self.best_of(averages), gated.nats, gated
        return "average", self.best_of(averages), averaged, None

    def gated(self, averaged: Float[Tensor, " N"]) -> Gated | None:
        """Return the cheapest gate under which the average's losses stay low, or None if none is much cheaper.

        It has to keep 0.9 of the average's gain, to take less than 0.8 of its time by what members take alone, and to
        show a gain itself, on documents that the choice among gates was not made by.
        """
        tried = list[Gated]()
        for i, own in enumerate(self.found.members.values()):
            for threshold in _THRESHOLDS:
                alone = own.confidence >= threshold
                nats = torch.where(alone, own.nats, averaged)
                tried.append(Gated(i, threshold, alone.double().mean().item(), nats))
        gains, all_of_it = torch.stack([self.base - own.nats for own in tried]), self.base - averaged

        def cheapest(rows: Tensor) -> Gated | None:
            least = _KEPT * all_of_it[rows].sum()
            enough = [own for own, gain in zip(tried, gains, strict=True) if gain[rows].sum() >= least]
            best = min(enough, key=self._time, default=None)
            return best if best is not None and self._time(best) <= _CHEAPER * sum(self.times) else None

        if (best := cheapest(self.fold >= 0)) is None:
            return None
        judged = averaged.clone()
        for k in self.fold.unique().tolist():
            if (elsewhere := cheapest(self.fold != k)) is not None:
                judged[self.fold == k] = elsewhere.nats[self.fold == k]
        return replace(best, nats=judged) if self.gain(judged).low > 0 else None

    def _time(self, gated: Gated) -> float:
        """Return the milliseconds a byte that an average behind a gate takes, by what members take alone."""
        own = self.times[gated.member]
        return own + (1 - gated.alone) * (sum(self.times) - own)

    def unfitted_gain(self, compared: Evaluation) -> Difference:
        """Return the gain of ``meet`` with equal weights over its pool, in bits a byte, at the positions compared."""
        ours, theirs = (own.nats / math.log(2) for own in compared.choices.values())
        return paired(theirs, ours, clusters(compared.positions.document), compared.positions.sizes)

    def knows_better(self) -> list[float]:
        """Return, for each member, the share of positions at which it finds the target likelier than all others do."""
        nats = torch.stack([self.found.members[name].nats for name in self.names])
        least = nats == nats.amin(0)
        return (least / least.sum(0)).mean(-1).tolist()

    def by_heart(self) -> list[str]:
        """Return the names of documents of which a member needs so few bits that it may know them by heart."""
        least = torch.stack([self.documents.sums(own.nats) for own in self.found.members.values()]).amin(0)
        known = least / math.log(2) < _BY_HEART * self.documents.sums(self.bytes)
        return [self.found.positions.names[k] for k in known.nonzero().squeeze(-1).tolist()]

    def cautions(self) -> list[str]:
        """Return sentences on what may make the verdict mislead; none if there is nothing to say."""
        count, unit, found = len(self.found.positions), self.found.vocabulary, list[str]()
        names = self.found.positions.document.unique()
        if count < _FEW_TOKENS:
            found.append(f"{count:,} {unit} are few: weights and gains may be those of chance. Give {_FEW_TOKENS:,}.")
        if self.within.kind != "documents":
            found.append(
                f"Fewer than {_FEW_DOCUMENTS} documents: intervals are by blocks of text, and hold for texts like this."
            )
        if self.too_long is not None:
            found.append(
                f"meet may differ from its average here, but was not tried on the whole text, as that would take about "
                f"{math.ceil(self.too_long / 60):,} minutes: softmeet fit does."
            )
        if known := self.by_heart():
            found.append(
                f"A member needs less than {_BY_HEART} bits a byte for {len(known)} of {len(names)} documents (such as "
                f"{known[0]}), as for text that it was trained on: leave them out, as they flatter who has seen them."
            )
        return found
