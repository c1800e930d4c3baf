"""An evaluation in pieces: documents, or stretches of long ones, each of which any worker can do by itself.

Pieces, and the chunks in which a piece is solved, follow from the text alone, and what comes of them is put together in
the order of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.choices import Choice
from softmeet.evaluation.documents import Document
from softmeet.evaluation.kept import Found, Kept
from softmeet.evaluation.perplexity import Evaluation, Scores, distinct_names, evaluate, settings_of
from softmeet.evaluation.positions import OF_TEXT, PIECE, Positions, observe
from softmeet.evaluation.windows import Reading, cut, grouped, readings, windows
from softmeet.scaling.base import Engine


def evaluate_text(
    ensemble: Ensemble,
    documents: Sequence[Document],
    choices: Sequence[Choice],
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    max_tokens: int | None = None,
    max_per_document: int | None = None,
    engine: Engine | None = None,
    kept: Kept | None = None,
    begin: Callable[[int], Callable[[int], None]] = lambda total: lambda count: None,
) -> Evaluation:
    """Every member and every choice on a text; hidden states are let go of with their piece.

    Args:
        ensemble: the members and their settings.
        documents: the text.
        choices: rules and options.
        window, stride, bos, max_tokens, max_per_document: as :func:`~softmeet.evaluation.windows.cut` has them.
        engine: where to run; None for here.
        kept: pieces that earlier runs finished.
        begin: called with the number of positions; gives what to call with the size of each piece.

    Raises:
        InvalidInputError: the text is too short, also for the prompts of ``choices``, or window and stride do not fit.
    """
    limits = {"bos": bos, "max_tokens": max_tokens, "max_per_document": max_per_document}
    tokens, size, step = cut(ensemble, documents, window=window, stride=stride, **limits)
    _require_longer([len(t.sizes) for t in tokens], choices)
    settings_of(ensemble, choices)
    groups = grouped(windows(tokens, size, step), _size(choices), by_document=True)
    sizes = [sum(map(len, group)) for group in groups]
    advance = begin(sum(sizes))
    found = (kept or Kept()).map(
        engine,
        "evaluate",
        _read_and_score,
        len(groups),
        lambda k: (ensemble, readings(tokens, groups[k]), choices),
        lambda k: advance(sizes[k]),
    )
    return _joined(ensemble, choices, found, [t.name for t in tokens])


def evaluate_positions(
    ensemble: Ensemble,
    positions: Positions,
    choices: Sequence[Choice],
    *,
    engine: Engine | None = None,
    kept: Kept | None = None,
    stage: str = "evaluate",
    on_progress: Callable[[int], None] = lambda positions: None,
) -> Evaluation:
    """The same at positions that are known.

    Args:
        ensemble: whose heads and settings are used.
        positions: of a text, or from a trace.
        choices: rules and options.
        engine: where to run; None for here.
        kept: pieces that earlier runs finished.
        stage: a name for these pieces.
        on_progress: called with the size of each piece.

    Raises:
        InvalidInputError: no document is longer than the prompts of ``choices``.
    """
    lengths = positions.document.unique_consecutive(return_counts=True)[1].tolist()
    _require_longer(lengths, choices)
    settings_of(ensemble, choices)
    pieces = [rows for own in torch.arange(len(positions)).split(lengths) for rows in own.split(_size(choices))]
    found = (kept or Kept()).map(
        engine,
        stage,
        _score,
        len(pieces),
        # Copied, so that products see them aligned alike wherever they run.
        lambda k: (ensemble, positions.take(pieces[k]), choices),
        lambda k: on_progress(len(pieces[k])),
    )
    return replace(_joined(ensemble, choices, found, positions.names), positions=positions)


def _require_longer(lengths: Sequence[int], choices: Sequence[Choice]) -> None:
    longest, prompt = max(lengths), max((choice.prompt for choice in choices), default=0)
    if prompt >= longest:
        raise InvalidInputError(
            f"expected a document of more than {prompt:,} predictions for weights from so many, but the longest has "
            f"{longest:,}: give fewer prompt weights"
        )


def _size(choices: Sequence[Choice]) -> int:
    """Of a piece; weights that follow from a document's beginning need all of it at once."""
    return 1 << 62 if any(choice.prompt for choice in choices) else PIECE


def _read_and_score(ensemble: Ensemble, read: Sequence[Reading], choices: Sequence[Choice]) -> Found:
    return _score(ensemble, observe(ensemble, read), choices)


def _score(ensemble: Ensemble, positions: Positions, choices: Sequence[Choice]) -> Found:
    found = evaluate(ensemble, positions, choices)
    flat = {"disagreement": found.disagreement}
    flat |= {name: getattr(positions, name).cpu() for name in OF_TEXT}
    for k, scores in enumerate([*found.members.values(), *found.choices.values()]):
        flat |= {f"{name} {k}": value for name, value in vars(scores).items()}
    return flat


def _joined(ensemble: Ensemble, choices: Sequence[Choice], found: Sequence[Found], names: list[str]) -> Evaluation:
    """Pieces in order as one evaluation, without hidden states."""

    def whole(name: str) -> Tensor:
        return torch.cat([piece[name] for piece in found])

    def scores(k: int) -> Scores:
        return Scores(*(whole(f"{field.name} {k}") for field in fields(Scores)))

    members = distinct_names(ensemble)
    return Evaluation(
        Positions([], names=names, **{name: whole(name) for name in OF_TEXT}),
        {name: scores(k) for k, name in enumerate(members)},
        {choice.name: scores(k) for k, choice in enumerate(choices, len(members))},
        whole("disagreement"),
        ensemble.model.config.vocabulary,
    )
