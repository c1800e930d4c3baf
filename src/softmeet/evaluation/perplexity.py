"""Scores of members and rules on a text: the loss, whether the top token was right, and its probability, by position.

A text is scored in pieces: documents, or stretches of long ones. Each piece can be scored alone, by any worker. The
pieces, and the chunks in which a piece is solved, do not depend on the number of workers, and results are joined in the
order of the text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, chain, count, pairwise
from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.documents import Document
from softmeet.evaluation.files import PieceCache, Tensors, join_tensors
from softmeet.evaluation.positions import PIECE, Positions, Window, Windowing, cut, from_tensors, grouped, observe
from softmeet.evaluation.scores import Evaluation, Scores, disagreement, prediction_scores
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.members.member import numbered
from softmeet.members.weighting import weights_by
from softmeet.rules.gates import Gate, that_closes
from softmeet.rules.movement import Movement
from softmeet.rules.settings import Settings, rule_of
from softmeet.rules.solution import Solution
from softmeet.scaling.base import Engine

# Elements of one member's log-probabilities in a chunk.
_ELEMENTS = 1 << 22


def chunk_size(v: int) -> int:
    """Return the number of positions to solve at once over ``v`` tokens: ⌊2²² / v⌋, at least 4 and at most 64."""
    return max(4, min(64, _ELEMENTS // v))


def evaluate(
    ensemble: Ensemble,
    positions: Positions,
    choices: Sequence[RuleChoice],
    on_progress: Callable[[int], None] = lambda positions: None,
) -> Evaluation:
    """Score every member and every choice at every position, in this process.

    Args:
        ensemble: supplies the heads and the settings that choices change; its own gate is ignored.
        positions: from :func:`softmeet.evaluation.positions.observe_text`, or from a trace.
        choices: rules of distinct names, each with changes to the ensemble's settings; an empty list for none.
        on_progress: called after each chunk with the number of positions in it.

    Raises:
        InvalidInputError: if a member and a choice have the same name, a setting is invalid or unusable over bytes.
        UnsupportedHeadError: if the ensemble is over bytes and a choice's rule needs softmax matrices, as ``meet``.
    """
    found = _score_piece(ensemble, positions, choices, on_progress)
    return replace(_as_evaluation(ensemble, choices, [found], positions.names), positions=positions)


def evaluate_text(
    ensemble: Ensemble,
    documents: Sequence[Document],
    choices: Sequence[RuleChoice],
    *,
    engine: Engine | None = None,
    cache: PieceCache | None = None,
    begin: Callable[[int], Callable[[int], None]] = lambda total: lambda count: None,
    **windowing: Unpack[Windowing],
) -> Evaluation:
    """Score every member and every choice on a text; a piece's hidden states are freed once it is scored.

    Args:
        ensemble: the members and their settings.
        documents: the text.
        choices: rules, each with changes to the ensemble's settings.
        engine: runs the pieces; None for this process.
        cache: keeps finished pieces, and supplies those that an earlier run finished.
        begin: as of :func:`softmeet.evaluation.positions.observe_text`.
        windowing: ``window``, ``stride``, ``bos``, ``max_tokens`` and ``max_per_document``, as in
            :class:`softmeet.evaluation.positions.Windowing`.

    Raises:
        InvalidInputError, UnsupportedHeadError: as in :func:`evaluate`; or if the text is too short (also for a
            choice's ``prompt``), or window and stride do not fit.
    """
    tokens, window, stride = cut(ensemble, documents, **windowing)
    size = _piece_size(ensemble, [len(t.sizes) for t in tokens], choices)
    groups = grouped(tokens, window, stride, size, by_document=True)
    advance = begin(sum(len(t.sizes) for t in tokens))
    found = (cache or PieceCache()).map(
        engine, "evaluate", _observe_and_score, groups, lambda group: (ensemble, group, choices),
        lambda done: advance(sum(map(len, chain.from_iterable(done)))),
    )  # fmt: skip
    return _as_evaluation(ensemble, choices, found, [t.name for t in tokens])


def evaluate_positions(
    ensemble: Ensemble,
    positions: Positions,
    choices: Sequence[RuleChoice],
    *,
    engine: Engine | None = None,
    cache: PieceCache | None = None,
    stage: str = "evaluate",
    on_progress: Callable[[int], None] = lambda positions: None,
) -> Evaluation:
    """Score every member and every choice at positions whose hidden states are known, in pieces that an engine runs.

    Args:
        ensemble: supplies the heads and the settings that choices change; its own gate is ignored.
        positions: from :func:`softmeet.evaluation.positions.observe_text`, or from a trace.
        choices: rules, each with changes to the ensemble's settings.
        engine: runs the pieces; None for this process.
        cache: keeps finished pieces, and supplies those that an earlier run finished.
        stage: the beginning of these pieces' names in the cache.
        on_progress: called with the number of positions that are done, as what ``begin`` of :func:`evaluate_text`
            returns.

    Raises:
        InvalidInputError, UnsupportedHeadError: as in :func:`evaluate`; or if no document is longer than a ``prompt``.
    """
    lengths = positions.document.unique_consecutive(return_counts=True)[1].tolist()
    size = _piece_size(ensemble, lengths, choices)
    pieces = [rows for own in torch.arange(len(positions)).split(lengths) for rows in own.split(size)]
    found = (cache or PieceCache()).map(
        # Rows are copied, for the same alignment in memory, on which products' last bits depend, in every process.
        engine, stage, _score_piece, pieces, lambda rows: (ensemble, positions.take(rows), choices),
        lambda done: on_progress(sum(map(len, done))),
    )  # fmt: skip
    return replace(_as_evaluation(ensemble, choices, found, positions.names), positions=positions)


def _piece_size(ensemble: Ensemble, lengths: Sequence[int], choices: Sequence[RuleChoice]) -> int:
    """Check the choices for documents of some lengths; return the most positions in a piece (with prompts: all)."""
    longest, prompt = max(lengths), max((choice.prompt for choice in choices), default=0)
    if prompt >= longest:
        raise InvalidInputError(
            f"expected a document of more than {prompt:,} predictions for weights from so many, but the longest has "
            f"{longest:,}: give fewer prompt weights"
        )
    settings_of(ensemble, choices)
    return longest if prompt else PIECE


def _observe_and_score(ensemble: Ensemble, read: Sequence[Window], choices: Sequence[RuleChoice]) -> Tensors:
    return _score_piece(ensemble, observe(ensemble, read, mixed=True), choices)


@torch.inference_mode()
def _score_piece(
    ensemble: Ensemble,
    positions: Positions,
    choices: Sequence[RuleChoice],
    on_progress: Callable[[int], None] = lambda positions: None,
) -> Tensors:
    """Score a piece; return the tensors of its targets and scores, the scores under numbered names, members first."""
    names = distinct_names(ensemble)
    if both := sorted({*names} & {choice.name for choice in choices}):
        raise InvalidInputError(
            f"expected members and rules of different names, but {both[0]} is both: rename the member"
        )
    settings, pieces = settings_of(ensemble, choices), []
    order = sorted(choices, key=lambda choice: _solving_order(settings[choice.name]))
    for chunk, weights in _chunks(ensemble, positions, choices):
        log_probs, logits = ensemble.model.combiner.own_log_probs(chunk.hidden)
        targets = chunk.targets.to(log_probs.device)
        scores = {name: prediction_scores(own, targets) for name, own in zip(names, log_probs, strict=True)}
        for name, costs in zip(names, chunk.costs, strict=False):
            scores[name] = replace(scores[name], work=costs.cpu())
        solver = _Solver(ensemble.model, chunk.hidden, log_probs, logits, targets)
        for choice in order:
            by_prompt = {"weights": weights[choice.prompt]} if choice.prompt else {}
            scores[choice.name] = solver.scores(settings[choice.name].changed(**by_prompt))
        pieces.append(replace(chunk, hidden=[], costs=[]).tensors() | {"disagreement": disagreement(log_probs)})
        pieces[-1] |= {
            f"claim {k}": own[:, -1].double().exp().cpu() for k, own in enumerate(chunk.hidden[len(names) :])
        }
        for k, name in enumerate([*names, *(choice.name for choice in choices)]):
            pieces[-1] |= {f"{field} {k}": value for field, value in vars(scores[name]).items()}
        on_progress(len(chunk))
    return join_tensors(pieces)


def _as_evaluation(
    ensemble: Ensemble, choices: Sequence[RuleChoice], pieces: Sequence[Tensors], names: list[str]
) -> Evaluation:
    """Join the tensors of pieces, in order, to an evaluation without hidden states; ``names`` are the documents'."""
    tensors = join_tensors(pieces)
    files = numbered([reader.name for reader in ensemble.model.claimants])
    scores = (Scores(*(tensors[f"{field.name} {k}"] for field in fields(Scores))) for k in count())
    return Evaluation(
        from_tensors(tensors, names),
        {name: next(scores) for name in distinct_names(ensemble)},
        {choice.name: next(scores) for choice in choices},
        tensors["disagreement"],
        ensemble.model.config.vocabulary,
        # What a fit reads is what the members say alone.
        claims={name: tensors[key] for k, name in enumerate(files) if (key := f"claim {k}") in tensors},
    )


def _solving_order(settings: Settings) -> tuple[bool, float]:
    """Return a sorting key: rules that tilt the pool first, by their trusts' sum; each may start from one before."""
    rule = settings.rule
    return (False, sum(rule.effective_trust(settings.member_trust))) if rule.tilts_pool else (True, 0.0)


def settings_of(ensemble: Ensemble, choices: Sequence[RuleChoice]) -> dict[str, Settings]:
    """Return each choice's full settings by its name: the ensemble's, ungated, with the choice's own in their place.

    A choice's gate ``auto`` is left out where its rule is none that the gate may close for.

    Raises:
        UnsupportedHeadError: if the ensemble is over bytes and a choice's rule needs softmax matrices, as ``meet``.
        InvalidInputError: if a setting is invalid, or a choice's gate cannot be used over bytes.
    """
    ungated = ensemble.model.settings.ungated()
    found = {choice.name: ungated.changed(**choice.settings) for choice in choices}
    for settings in found.values():
        ensemble.model.require(settings)
    return {name: ensemble.model.combiner.resolved(settings) for name, settings in found.items()}


def distinct_names(ensemble: Ensemble) -> list[str]:
    """Return the members' names, or, as a prompt may be long, titles of those of more than a source; all distinct."""
    return numbered([own.title if own.changes() else own.source for own in ensemble.model.contexts.members])


def _chunks(
    ensemble: Ensemble, positions: Positions, choices: Sequence[RuleChoice]
) -> Iterator[tuple[Positions, dict[int, list[float]]]]:
    """Yield (chunk, the members' weights in it by length of prompt); with prompts no chunk crosses a document's end."""
    size = chunk_size(ensemble.model.config.vocab_size)
    prompts = sorted({choice.prompt for choice in choices if choice.prompt})
    if not prompts:
        yield from ((chunk, {}) for chunk in positions.chunks(size))
        return
    lengths = positions.document.unique_consecutive(return_counts=True)[1].tolist()
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        document = positions.take(slice(start, stop))
        cuts = sorted({0, len(document), *(p for p in prompts if p < len(document))})
        begun = {p: document.take(slice(p)) for p in prompts}
        own_log_probs = ensemble.model.combiner.own_log_probs
        known = {p: weights_by(own_log_probs(prompt.hidden)[0], prompt.targets) for p, prompt in begun.items()}
        own = list(ensemble.model.config.weights)
        for first, last in pairwise(cuts):
            # A prompt's own tokens are predicted with the ensemble's weights.
            weights = {p: known[p] if first >= p else own for p in prompts}
            yield from ((chunk, weights) for chunk in document.take(slice(first, last)).chunks(size))


@dataclass(eq=False)
class _Solver:
    """A scorer of choices on one chunk of B positions.

    Choices that differ only in their gates share one ungated solution; those that differ only in trusts start from
    one another's solutions.
    """

    model: EnsembleForCausalLM
    hidden: Sequence[Float[Tensor, "B _"]]
    log_probs: Float[Tensor, "n B v"]
    logits: Float[Tensor, "n B v"] | None
    targets: Int[Tensor, " B"]
    solved: dict[Settings, tuple[Solution, Scores]] = field(default_factory=dict)
    paths: dict[Settings, list[Solution]] = field(default_factory=lambda: defaultdict(list))

    def scores(self, settings: Settings) -> Scores:
        """Score a rule under some settings on the chunk, reusing a solution without the gate if there is one."""
        gate, plain = that_closes(settings.gate), settings.ungated()
        if gate is not None and plain not in self.solved:
            solved = self.model.combiner.combine_rows(self.log_probs, self.logits, settings, hidden=self.hidden)
            return _solution_scores(solved, self.targets)
        if plain not in self.solved:
            solution = self._solve(plain)
            self.solved[plain] = solution, _solution_scores(solution, self.targets)
        solution, scores = self.solved[plain]
        return scores if gate is None else self._under_gate(gate, settings, solution, scores)

    def _solve(self, settings: Settings) -> Solution:
        """Solve without a gate, starting from an earlier solution if there is one; another may be the fallback."""
        rule, known = settings.rule, dict[str, Any](hidden=self.hidden)
        path = self.paths[settings.model_copy(update={"rule": None, "trust": ()})]
        if rule.reads_heads and path:
            known["start"] = path[-1]
            if settings.on_infeasible != "raise":
                wanted = rule_of(settings.on_infeasible), settings.relaxed().trust
                fits = (s for s in path if (s.problem.settings.rule, s.problem.trust) == wanted)
                known["relaxed"] = next(fits, None)
        solution = self.model.combiner.combine_rows(self.log_probs, self.logits, settings, **known)
        if rule.tilts_pool:
            path.append(solution)
        return solution

    def _under_gate(self, gate: Gate, settings: Settings, solution: Solution, scores: Scores) -> Scores:
        """Replace ungated scores by those under the gate, at the positions at which the gate is closed."""
        closed = ~gate.open(solution.problem)
        if not closed.any():
            return scores
        logits, hidden = None if self.logits is None else self.logits[:, closed], [own[closed] for own in self.hidden]
        solved = self.model.combiner.combine_rows(self.log_probs[:, closed], logits, settings, hidden=hidden)
        there = _solution_scores(solved, self.targets[closed])
        both = zip(_without_movement(scores), _without_movement(there), strict=True)
        return Scores(*(whole.masked_scatter(closed.cpu(), own) for whole, own in both))


def _solution_scores(solution: Solution, targets: Int[Tensor, " B"]) -> Scores:
    """Score a rule's solution at B positions, with how its rows ended and how far it moves the pool."""
    ends = (solution.num_passes.double(), solution.fallback, solution.status, solution.gated)
    found = prediction_scores(solution.log_probs, targets, *ends)
    moved = None if that_closes(solution.problem.settings.gate) else Movement.of(solution)
    return found if moved is None else replace(found, movement=moved.table())


def _without_movement(scores: Scores) -> list[Tensor]:
    return [value for name, value in vars(scores).items() if name not in ("work", "movement")]
