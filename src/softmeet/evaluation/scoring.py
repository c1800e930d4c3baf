"""Averages fitted to a text by Fisher scoring, all of it or without a fold, and judged there.

Scoring steps along the gradient by the inverse of the Fisher information (McCullagh and Nelder, *Generalized Linear
Models*, 1989, §2.5), and needs a few evaluations where a method that sees gradients alone needs tens. Where a step does
not lower the loss, as far from the optimum, it is made again, shorter and more along the gradient (Levenberg, *A method
for the solution of certain non-linear problems in least squares*, 1944).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.evaluation.average import Family, Sums
from softmeet.evaluation.files import PieceCache, Tensors, join_tensors
from softmeet.evaluation.layout import Layout, Values
from softmeet.evaluation.perplexity import chunk_size
from softmeet.evaluation.positions import PIECE, Positions
from softmeet.evaluation.scores import Evaluation, Scores, disagreement, prediction_scores
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.rules.settings import Settings
from softmeet.scaling.base import Engine

# Elements of log-probabilities in one step: they stay in a core's cache.
_CACHED_ELEMENTS = 1 << 18
# The share of the machine's memory up to which log-probabilities are kept between evaluations, not computed again.
HELD = 0.4
# Scoring ends when a step is expected to lower the loss by less, in nats a position.
_ENOUGH = 1e-6
# The longest step in θ.
_STRIDE = 3.0
# What is added to the information, as a share of its largest entry: the least, which keeps directions that leave the
# average as it is in place; after the first step that fails; how many times as much after each more, and as little
# after each that does not.
_LEAST, _FIRST, _TIMES = 1e-9, 1e-2, 10.0

# At how many θ, of all families, sums over pieces are kept.
_REMEMBERED = 256
# What is scored of each member and average, fields of ``Scores``.
_SCORED = ("nats", "hit", "confidence")

# An average by its family and its values.
Average = tuple[Family, Values]


@dataclass
class Piece:
    """A piece of a text, at which averages are fitted and judged.

    Attributes:
        model: the ensemble, for its members' heads.
        positions: the piece's positions, with hidden states.
        keep: whether log-probabilities are kept once they are computed.
        solved: settings of rules, whose answers take the place of the members' predictions; empty for the members.
    """

    model: EnsembleForCausalLM
    positions: Positions
    keep: bool
    solved: tuple[Settings, ...] = ()
    _held: dict[int, Tensor] = field(default_factory=dict, init=False)

    def sums(self, family: Family, theta: Float[Tensor, " k"]) -> Sums:
        """Return the loss of a family's average at ``theta``, with its derivatives, summed over the piece."""
        k = len(theta)
        total = Sums(0.0, theta.new_zeros(k), theta.new_zeros(k, k))
        for log_p, targets in self._steps():
            own = log_p if family.members is None else log_p[list(family.members)]
            total = total.plus(family.sums(theta, own, targets, self.model.combiner.support))
        return total

    @torch.inference_mode()
    def scores(self, averages: Sequence[Average], weights: Sequence[Float[Tensor, "n N"]] | None = None) -> Tensors:
        """Score every member and some averages: ``nats``, ``hit`` and ``confidence``, (N, members + averages) each.

        ``disagreement``, (N,), is the members', in nats. With ``weights``, the members' at every position for each
        average, in place of those in its values, the averages alone are scored, and there is no ``disagreement``.
        """
        support, found, start = self.model.combiner.support, list[Tensors](), 0
        for log_p, targets in self._steps():
            made = list[Tensor]()
            for k, (family, values) in enumerate(averages):
                own = log_p if family.members is None else log_p[list(family.members)]
                each = None if weights is None else weights[k][:, start : start + len(targets)]
                made.append(family.log_probs(values, own, support, each))
            start += len(targets)
            members = log_p if weights is None else ()
            scored = [prediction_scores(own, targets) for own in (*members, *made)]
            found.append({name: torch.stack([getattr(own, name) for own in scored], -1) for name in _SCORED})
            if weights is None:
                found[-1]["disagreement"] = disagreement(log_p)
        return join_tensors(found)

    def _steps(self) -> Iterator[tuple[Float[Tensor, "n B v"], Int[Tensor, " B"]]]:
        """Yield (the members' log-probabilities, the targets) at a few positions at a time."""
        v = self.model.config.vocab_size
        step = max(1, _CACHED_ELEMENTS // v)
        for place, chunk in enumerate(self.positions.chunks(max(chunk_size(v), step))):
            log_p = self._log_probs(place, chunk)
            targets = chunk.targets.to(log_p.device)
            for start in range(0, len(chunk), step):
                yield log_p[:, start : start + step], targets[start : start + step]

    @torch.no_grad()
    def _log_probs(self, place: int, chunk: Positions) -> Float[Tensor, "n B v"]:
        if place in self._held:
            return self._held[place]
        log_p, logits = self.model.combiner.own_log_probs(chunk.hidden)
        if self.solved:
            solve = partial(self.model.combiner.combine_rows, log_p, logits, hidden=chunk.hidden)
            answers = [solve(settings).log_probs for settings in self.solved]
            log_p = torch.stack(answers).to(log_p.dtype)
        if self.keep:
            self._held[place] = log_p
        return log_p


class Text:
    """A text in pieces, at which averages are fitted: at all of it, or without the documents of one fold.

    A piece has positions from all over its fold, so that a few pieces are a sample of it. The members'
    log-probabilities are computed once for all fits, as far as they fit the machine's memory.

    Args:
        model: the ensemble, for its members' heads.
        positions: the text's positions, with hidden states.
        engine: runs the pieces.
        fold: the fold of each position, (N,), int64, numbered from 0 without gaps; None for a single one.
        sample: at about how many positions averages are fitted; None for all.
        cache: keeps evaluations and scores, and supplies those of an earlier run. None to keep nothing.
        solved: for each fold, settings of rules whose answers take the place of the members' predictions; as many for
            every fold. None for the members.
        stage: the beginning of the names of scores in the cache.
    """

    def __init__(
        self, model: EnsembleForCausalLM, positions: Positions, engine: Engine, fold: Int[Tensor, " N"] | None = None,
        *, sample: int | None = None, cache: PieceCache | None = None,
        solved: Sequence[Sequence[Settings]] | None = None, stage: str = "averages",
    ) -> None:  # fmt: skip
        self._engine, self._cache, self._positions = engine, cache or PieceCache(), positions
        self._model, self._stage = model, stage
        # Sums over pieces, by the piece's number, at the θ that were asked for last. Fits without a fold begin where
        # that on all folds ended: their first evaluations share the pieces.
        self._known = lru_cache(_REMEMBERED)(lambda family, theta: dict[int, Sums]())
        v, fold = model.config.vocab_size, torch.zeros(len(positions), dtype=torch.int64) if fold is None else fold
        # Pieces of wide heads are smaller, so that every worker has some.
        size = min(PIECE, 2 * chunk_size(v))
        self._rows, self._fold, self._fitted = list[Tensor](), list[int](), list[bool]()
        for k in fold.unique().tolist():
            own = (fold == k).nonzero().squeeze(-1)
            count = math.ceil(len(own) / size)
            share = count if sample is None else math.ceil(count * min(1.0, sample / len(positions)))
            self._rows += [own[place::count] for place in range(count)]
            self._fold += [k] * count
            self._fitted += [place < share for place in range(count)]
        room = HELD * psutil.virtual_memory().total / (4 * len(model.heads) * v)
        order = sorted(range(len(self._rows)), key=lambda place: not self._fitted[place])
        first = dict(zip(order, accumulate(len(self._rows[place]) for place in order), strict=True))
        self._pieces = engine.keep(
            [
                Piece(model, positions.take(rows), first[place] <= room, tuple(solved[k]) if solved else ())
                for place, (rows, k) in enumerate(zip(self._rows, self._fold, strict=True))
            ]
        )

    def sums(
        self, family: Family, theta: Float[Tensor, " k"], without: int | None = None,
        on_progress: Callable[[int], None] = lambda positions: None,
    ) -> Sums:  # fmt: skip
        """Return the mean loss of a family's average at ``theta``, with its derivatives, per position of the sample.

        Pieces are added in order, so that the result does not depend on where they ran.

        Args:
            family: the averages.
            theta: the parameters θ, (k,), fp64.
            without: a fold that is left out; None for all positions.
            on_progress: called with the number of positions of each finished piece.
        """
        taken = [k for k, own in enumerate(self._fold) if own != without and self._fitted[k]]
        found = self._known(family, tuple(theta.tolist()))
        missing = [k for k in taken if k not in found]
        for place, sums in self._engine.map(Piece.sums, [(self._pieces[k], family, theta) for k in missing]):
            found[missing[place]] = sums
            on_progress(len(self._rows[missing[place]]))
        losses, gradients, information = zip(*(found[k] for k in taken), strict=True)
        count = sum(len(self._rows[k]) for k in taken)
        return Sums(sum(losses) / count, torch.stack(gradients).sum(0) / count, torch.stack(information).sum(0) / count)

    def fit(
        self, family: Family, start: Values, evaluations: int, name: str, *, without: int | None = None,
        on_progress: Callable[[int], None] = lambda positions: None,
    ) -> tuple[Values, float, int]:  # fmt: skip
        """Minimise the loss of a family's average within the bounds of its layout.

        What is found is a local minimum: a power mean's loss can have one at either end of its orders.

        Args:
            family: the averages.
            start: the values to begin at.
            evaluations: the most evaluations of the loss.
            name: of these evaluations in the cache.
            without: a fold that is left out; None for all positions.
            on_progress: called with the number of positions of each finished piece of an evaluation.

        Returns:
            (the best values, their loss in nats per position, the number of evaluations).
        """
        layout, count = family.layout, 0

        def evaluated(theta: Tensor) -> Sums:
            nonlocal count
            count += 1
            evaluate = partial(self.sums, family, theta, without, on_progress)
            return Sums(*self._cache.evaluation(f"{name}-{count:04d}", evaluate))

        best = layout.pack(start)
        at, damping = evaluated(best), _LEAST
        while count < evaluations and (step := _step(layout, best, at, damping)) is not None:
            theta = layout.clip(best + step)
            found = evaluated(theta)
            if found.loss < at.loss:
                best, at, damping = theta, found, max(damping / _TIMES, _LEAST)
            else:
                damping = max(damping * _TIMES, _FIRST)
        return layout.values(best), at.loss, count

    def scores(
        self, members: Sequence[str], averages: Sequence[Mapping[str, Average]],
        on_progress: Callable[[int], None] = lambda positions: None,
    ) -> Evaluation:  # fmt: skip
        """Score the members and averages at all positions.

        Args:
            members: the members' names.
            averages: by name, those that are scored at the positions of each fold, the same names for all.
            on_progress: called with the number of positions that are done.
        """
        whole = self._map(self._stage, Piece.scores, lambda k: (list(averages[self._fold[k]].values()),), on_progress)
        scored = _named(whole, [*members, *averages[0]])
        for name, costs in zip(members, self._positions.costs, strict=False):
            scored[name] = replace(scored[name], work=costs.cpu())
        return Evaluation(
            replace(self._positions, hidden=[], costs=[]),
            {name: scored[name] for name in members},
            {name: scored[name] for name in averages[0]},
            whole["disagreement"],
            self._model.config.vocabulary,
        )

    def weighted_scores(
        self, averages: Sequence[Mapping[str, Average]], weights: Mapping[str, Float[Tensor, "n N"]], stage: str,
        on_progress: Callable[[int], None] = lambda positions: None,
    ) -> dict[str, Scores]:  # fmt: skip
        """Score averages with weights of their own at each position.

        Args:
            averages: by name, those that are scored at the positions of each fold, the same names for all.
            weights: by name, the members' weights of every average at each position.
            stage: the beginning of these scores' names in the cache.
            on_progress: called with the number of positions that are done.
        """
        names = list(averages[0])
        whole = self._map(
            stage, Piece.scores,
            lambda k: (list(averages[self._fold[k]].values()), [weights[name][:, self._rows[k]] for name in names]),
            on_progress,
        )  # fmt: skip
        return _named(whole, names)

    def _map(
        self, stage: str, score: Callable[..., Tensors], arguments: Callable[[int], tuple[Any, ...]],
        on_progress: Callable[[int], None],
    ) -> Tensors:  # fmt: skip
        """Score every piece; return the scores in the order of the text."""
        pieces = self._cache.map(
            self._engine, stage, score, range(len(self._rows)), lambda k: (self._pieces[k], *arguments(k)),
            lambda done: on_progress(sum(len(self._rows[k]) for k in done)),
        )  # fmt: skip
        back = torch.cat(self._rows).argsort()
        return {name: values[back] for name, values in join_tensors(pieces).items()}


def _named(scores: Tensors, names: Sequence[str]) -> dict[str, Scores]:
    """Return scores by name, from tensors with a column for each."""
    columns = zip(*(scores[name].unbind(-1) for name in _SCORED), strict=True)
    return dict(zip(names, (Scores(*own) for own in columns), strict=True))


def _step(layout: Layout, theta: Float[Tensor, " k"], at: Sums, damping: float) -> Float[Tensor, " k"] | None:
    """Return the best step from ``theta`` within the bounds; None if it would lower the loss by next to nothing.

    Best is what minimises the loss's expansion to second order, with the information as its second derivatives.
    """
    from scipy.optimize import lsq_linear

    if not math.isfinite(at.loss):
        return None
    values, vectors = torch.linalg.eigh(at.information)
    # Where members are certain of what does not come, there is next to no information, but a gradient.
    roots = (values.clamp_min(0) + damping * values[-1].clamp_min(_LEAST)).sqrt()
    low, high = torch.tensor(layout.bounds(), dtype=torch.float64).unbind(-1)
    room = (low - theta).clamp_min(-_STRIDE).numpy(), (high - theta).clamp_max(_STRIDE).numpy()
    squares = (roots[:, None] * vectors.T).numpy(), (-(vectors.T @ at.gradient) / roots).numpy()
    step = torch.from_numpy(lsq_linear(*squares, room, method="bvls").x)
    lowered = -(step @ at.gradient) - step @ at.information @ step / 2
    return step if lowered.item() > _ENOUGH else None
