"""Positions: what members made of a text, from which every rule can be tried without running a model again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.evaluation.documents import Document
from softmeet.evaluation.kept import Found, Kept
from softmeet.evaluation.windows import Reading, cut, grouped, readings, windows
from softmeet.scaling.base import Engine

# Positions of a piece of work, about: many enough to be worth sending, few enough to be lost.
PIECE = 256
# What a piece holds of the text.
OF_TEXT = ("targets", "document", "sizes")


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
        """All positions, in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


def join(parts: Sequence[Positions], names: list[str]) -> Positions:
    """Several stretches of positions as one."""
    return Positions(
        [torch.cat(own) for own in zip(*(part.hidden for part in parts), strict=True)],
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in OF_TEXT},
        names=names,
    )


@torch.no_grad()  # not inference mode: a fit differentiates through what comes of these
def observe(ensemble: Ensemble, read: Sequence[Reading]) -> Positions:
    """Run every member over some windows, one at a time.

    Args:
        ensemble: its members run once a window.
        read: the windows.

    Returns:
        Their positions, on the ensemble's device, without the documents' names.
    """
    parts = []
    for window in read:
        ids, predicted = window.ids.to(ensemble.model.device), slice(-len(window.sizes), None)
        hidden = [h[predicted] for h in ensemble.model.hidden_states(ids[None, :-1])]
        place = torch.full_like(ids[predicted], window.place)
        parts.append(Positions(hidden, ids[predicted], place, window.sizes.to(ids.device), []))
    return join(parts, [])


def observe_text(
    ensemble: Ensemble,
    documents: Sequence[Document],
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    max_tokens: int | None = None,
    max_per_document: int | None = None,
    engine: Engine | None = None,
    kept: Kept | None = None,
    on_progress: Callable[[int], None] = lambda positions: None,
) -> Positions:
    """Tokenize documents and run every member over them; arguments as :func:`cut` has them.

    Args:
        engine: where to run the members; None for here.
        kept: pieces that earlier runs finished.
        on_progress: called with numbers of positions that are done.

    Raises:
        InvalidInputError: the text is too short, or window and stride do not fit.
    """
    limits = {"bos": bos, "max_tokens": max_tokens, "max_per_document": max_per_document}
    found, size, step = cut(ensemble, documents, window=window, stride=stride, **limits)
    groups = grouped(windows(found, size, step), PIECE, by_document=False)
    pieces = (kept or Kept()).map(
        engine,
        "observe",
        _observed,
        len(groups),
        lambda k: (ensemble, readings(found, groups[k])),
        lambda k: on_progress(sum(map(len, groups[k]))),
    )

    def whole(name: str) -> Tensor:
        return torch.cat([piece[name] for piece in pieces])

    hidden = [whole(f"hidden {i}") for i in range(len(ensemble.names))]
    return Positions(hidden, names=[t.name for t in found], **{name: whole(name) for name in OF_TEXT})


def _observed(ensemble: Ensemble, read: Sequence[Reading]) -> Found:
    found = observe(ensemble, read)
    packed = {name: getattr(found, name).cpu() for name in OF_TEXT}
    return packed | {f"hidden {i}": hidden.cpu() for i, hidden in enumerate(found.hidden)}
