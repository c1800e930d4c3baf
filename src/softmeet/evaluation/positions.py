"""Positions: what members made of a text, from which every rule can be tried without running a model again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Int
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.evaluation.cache import PieceCache, Tensors, join_tensors
from softmeet.evaluation.documents import Document
from softmeet.evaluation.windows import Window, Windowing, cut, grouped, windows
from softmeet.scaling.base import Engine

# Positions of a piece of work, about: many enough to be worth sending, few enough to be lost.
PIECE = 256
_OF_TEXT = ("targets", "document", "sizes")


@dataclass(frozen=True, eq=False)
class Positions:
    """N positions of a text.

    Attributes:
        hidden: each member's last hidden states, (N, d_i).
        targets: the tokens that came, (N,).
        document: which document each position belongs to, (N,), an index into ``names``.
        sizes: UTF-8 bytes that each target adds to the text, (N,).
        names: of the documents.
    """

    hidden: list[Tensor]
    targets: Int[Tensor, " N"]
    document: Int[Tensor, " N"]
    sizes: Int[Tensor, " N"]
    names: list[str]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: slice | Tensor) -> Positions:
        """Select some of the positions, in the order of the index."""
        hidden = [h[rows] for h in self.hidden]
        return Positions(hidden, self.targets[rows], self.document[rows], self.sizes[rows], self.names)

    def chunks(self, size: int) -> Iterator[Positions]:
        """Yield all positions, in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def tensors(self) -> Tensors:
        """Return all tensors by name, in the processor's memory."""
        found = {name: getattr(self, name).cpu() for name in _OF_TEXT}
        return found | {f"hidden {i}": hidden.cpu() for i, hidden in enumerate(self.hidden)}


def from_tensors(found: Tensors, names: list[str]) -> Positions:
    """Make positions of what :meth:`Positions.tensors` returned; other tensors in ``found`` are ignored."""
    hidden = [found[f"hidden {i}"] for i in range(sum(name.startswith("hidden ") for name in found))]
    return Positions(hidden, **{name: found[name] for name in _OF_TEXT}, names=names)


def join(parts: Sequence[Positions], names: list[str]) -> Positions:
    """Join stretches of positions, in order, whose documents are called ``names``."""
    return Positions(
        [torch.cat(own) for own in zip(*(part.hidden for part in parts), strict=True)],
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in _OF_TEXT},
        names=names,
    )


@torch.no_grad()  # not inference mode: a fit differentiates through what comes of these
def observe(ensemble: Ensemble, read: Sequence[Window]) -> Positions:
    """Run every member over some windows, one window at a time.

    Returns:
        The windows' positions, on the ensemble's device, without the documents' names.
    """
    parts = []
    for window in read:
        ids, predicted = window.ids.to(ensemble.model.device), slice(-len(window), None)
        hidden = [h[predicted] for h in ensemble.model.hidden_states(ids[None, :-1])]
        document = torch.full_like(ids[predicted], window.document)
        parts.append(Positions(hidden, ids[predicted], document, window.sizes.to(ids.device), []))
    return join(parts, [])


def observe_text(
    ensemble: Ensemble,
    documents: Sequence[Document],
    *,
    engine: Engine | None = None,
    cache: PieceCache | None = None,
    on_progress: Callable[[int], None] = lambda positions: None,
    **windowing: Unpack[Windowing],
) -> Positions:
    """Tokenize documents and run every member over them.

    Args:
        ensemble: the members.
        documents: the text.
        engine: where to run the members; None for this process.
        cache: pieces that earlier runs finished.
        on_progress: called with the number of positions of each piece that is done.
        windowing: ``window``, ``stride``, ``bos``, ``max_tokens`` and ``max_per_document``, as
            :func:`softmeet.evaluation.windows.cut` has them.

    Raises:
        InvalidInputError: the text is too short, or window and stride do not fit.
    """
    tokens, window, stride = cut(ensemble, documents, **windowing)
    groups = grouped(windows(tokens, window, stride), PIECE, by_document=False)
    found = (cache or PieceCache()).map(
        engine, "observe", _observe_piece, groups, lambda group: (ensemble, group),
        lambda group: on_progress(sum(map(len, group))),
    )  # fmt: skip
    return from_tensors(join_tensors(found), [t.name for t in tokens])


def _observe_piece(ensemble: Ensemble, read: Sequence[Window]) -> Tensors:
    return observe(ensemble, read).tensors()
