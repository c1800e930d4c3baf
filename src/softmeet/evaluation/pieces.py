"""An evaluation in pieces: documents, or stretches of long ones, each of which any worker can do by itself.

Pieces, and the chunks in which a piece is solved, follow from the text alone, and what comes of them is put together in
the order of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import count
from typing import Unpack

import torch

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.cache import PieceCache, Tensors
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.documents import Document
from softmeet.evaluation.perplexity import Evaluation, Scores, distinct_names, evaluate, settings_of
from softmeet.evaluation.positions import PIECE, Positions, from_tensors, observe
from softmeet.evaluation.windows import Window, Windowing, cut, grouped, windows
from softmeet.scaling.base import Engine


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
    """Score every member and every choice on a text; hidden states are let go of with their piece.

    Args:
        ensemble: the members and their settings.
        documents: the text.
        choices: rules and options.
        engine: where to run; None for this process.
        cache: pieces that earlier runs finished.
        begin: called with the number of positions; gives what to call with the size of each piece that is done.
        windowing: ``window``, ``stride``, ``bos``, ``max_tokens`` and ``max_per_document``, as
            :func:`softmeet.evaluation.windows.cut` has them.

    Raises:
        InvalidInputError: the text is too short, also for the prompts of ``choices``, or window and stride do not fit.
    """
    tokens, window, stride = cut(ensemble, documents, **windowing)
    size = _piece_size(ensemble, [len(t.sizes) for t in tokens], choices)
    groups = grouped(windows(tokens, window, stride), size, by_document=True)
    advance = begin(sum(len(t.sizes) for t in tokens))
    found = (cache or PieceCache()).map(
        engine, "evaluate", _observe_and_score, groups, lambda group: (ensemble, group, choices),
        lambda group: advance(sum(map(len, group))),
    )  # fmt: skip
    return _join(ensemble, choices, found, [t.name for t in tokens])


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
    """Score every member and every choice at positions whose hidden states are known.

    Args:
        ensemble: whose heads and settings are used.
        positions: of a text, or from a trace.
        choices: rules and options.
        engine: where to run; None for this process.
        cache: pieces that earlier runs finished.
        stage: what these pieces are called in the cache.
        on_progress: called with the number of positions of each piece that is done.

    Raises:
        InvalidInputError: no document is longer than the prompts of ``choices``.
    """
    lengths = positions.document.unique_consecutive(return_counts=True)[1].tolist()
    size = _piece_size(ensemble, lengths, choices)
    pieces = [rows for own in torch.arange(len(positions)).split(lengths) for rows in own.split(size)]
    found = (cache or PieceCache()).map(
        # Rows are copied, so that products see them aligned alike wherever they run.
        engine, stage, _score, pieces, lambda rows: (ensemble, positions.take(rows), choices),
        lambda rows: on_progress(len(rows)),
    )  # fmt: skip
    return replace(_join(ensemble, choices, found, positions.names), positions=positions)


def _piece_size(ensemble: Ensemble, lengths: Sequence[int], choices: Sequence[RuleChoice]) -> int:
    """Check the choices for documents of some lengths, and return how many positions make a piece.

    Weights that follow from a document's beginning need all of it at once.
    """
    longest, prompt = max(lengths), max((choice.prompt for choice in choices), default=0)
    if prompt >= longest:
        raise InvalidInputError(
            f"expected a document of more than {prompt:,} predictions for weights from so many, but the longest has "
            f"{longest:,}: give fewer prompt weights"
        )
    settings_of(ensemble, choices)
    return longest if prompt else PIECE


def _observe_and_score(ensemble: Ensemble, read: Sequence[Window], choices: Sequence[RuleChoice]) -> Tensors:
    return _score(ensemble, observe(ensemble, read), choices)


def _score(ensemble: Ensemble, positions: Positions, choices: Sequence[RuleChoice]) -> Tensors:
    """Evaluate a piece; the tensors of its scores are numbered, members first."""
    found = evaluate(ensemble, positions, choices)
    tensors = replace(positions, hidden=[]).tensors() | {"disagreement": found.disagreement}
    for k, scores in enumerate([*found.members.values(), *found.choices.values()]):
        tensors |= {f"{name} {k}": value for name, value in vars(scores).items()}
    return tensors


def _join(ensemble: Ensemble, choices: Sequence[RuleChoice], pieces: Sequence[Tensors], names: list[str]) -> Evaluation:
    """Join pieces, in order, to an evaluation without hidden states."""
    tensors = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    scores = (Scores(*(tensors[f"{field.name} {k}"] for field in fields(Scores))) for k in count())
    return Evaluation(
        from_tensors(tensors, names),
        {name: next(scores) for name in distinct_names(ensemble)},
        {choice.name: next(scores) for choice in choices},
        tensors["disagreement"],
        ensemble.model.config.vocabulary,
    )
