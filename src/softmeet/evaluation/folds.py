"""Cross-validation by document: what is fitted on all folds but one is judged on that one, in turn."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.evaluation.intervals import Clusters
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.scores import Evaluation, Scores

K = TypeVar("K", bound=Hashable)


def folds_of(within: Clusters, count: int) -> Int[Tensor, " N"]:
    """Deal clusters (documents, or blocks of text) out to folds in turn; return the fold of each position.

    Args:
        within: the clusters of N positions.
        count: the number of folds.

    Raises:
        InvalidInputError: if ``count`` is below 2, or there are fewer clusters.

    >>> folds_of(Clusters(torch.tensor([0, 0, 1, 2, 2, 3]), "documents"), 2)
    tensor([0, 0, 1, 0, 0, 1])
    """
    if count < 2:
        raise InvalidInputError(f"expected at least 2 folds, got {count}")
    if within.count < count:
        raise InvalidInputError(
            f"expected text enough for {count} folds, got {within.count} {within.kind}: give more text, or fewer folds"
        )
    return within.of % count


def best_elsewhere(losses: Mapping[K, Float[Tensor, " N"]], fold: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the losses of whichever candidate is best on the other folds, at each position.

    This is what choosing the best candidate by a text costs on documents that the choice was not made by.

    Args:
        losses: of each candidate, in nats, (N,).
        fold: of each position, (N,), int64.

    >>> best_elsewhere({"a": torch.tensor([0.0, 9.0]), "b": torch.tensor([1.0, 1.0])}, torch.tensor([0, 1]))
    tensor([1., 9.])
    """
    table = torch.stack(list(losses.values()))
    found = torch.empty_like(table[0])
    for k in fold.unique().tolist():
        here = fold == k
        found[here] = table[table[:, ~here].mean(-1).argmin(), here]
    return found


def joined(found: Sequence[Evaluation], positions: Positions, fold: Int[Tensor, " N"]) -> Evaluation:
    """Join evaluations of folds, the first fold first, to one of the whole text.

    Args:
        found: an evaluation at the positions of each fold.
        positions: those of the whole text.
        fold: of each position, (N,), int64.
    """
    # Positions in the order in which folds have them; the inverse puts scores back in the text's order.
    back = fold.argsort(stable=True).argsort()

    def one(parts: Sequence[Scores]) -> Scores:
        whole = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Scores)}
        return Scores(**{name: values[back] if len(values) == len(back) else values for name, values in whole.items()})

    return replace(
        found[0],
        positions=positions,
        members={name: one([part.members[name] for part in found]) for name in found[0].members},
        choices={name: one([part.choices[name] for part in found]) for name in found[0].choices},
        disagreement=torch.cat([part.disagreement for part in found])[back],
    )
