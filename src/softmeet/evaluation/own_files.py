"""What the user's own files are worth beside a model: on some of them, which are held out, or on another text."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmeet.ensemble import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.evaluation.claimed import beside
from softmeet.evaluation.costs import SAME, larger
from softmeet.evaluation.documents import Document
from softmeet.evaluation.intervals import Clusters, Difference, paired
from softmeet.evaluation.positions import Positions
from softmeet.hf.claiming import files_of, give_claims, texts_of

# So many files are held out at the most, each from its beginning to so many bytes, and none with fewer than so many.
_MOST, _BYTES, _LEAST = 12, 1800, 900
# Of so many files that could be held out one is.
_SHARE = 4
# Behind so many bytes the header of a file is past.
HEADER = 600


def hold_out(
    ensemble: Ensemble,
    documents: list[Document] | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[Document] | None:
    """Have the files beside an ensemble be without those that are its text, so that each is read without itself.

    Args:
        ensemble: the ensemble; its files change, unless none of them is among the documents.
        documents: the text; None for the beginnings of some of the files, drawn at random by a fixed seed.
        on_progress: called with what is done.

    Returns:
        The text; None if none was given, and no files stand beside the ensemble.

    Raises:
        InvalidInputError: if there is no text, and too few of the files are long enough; or all are the text.
    """
    model = ensemble.model
    every = sorted({path for files in files_of(model) for path in texts_of(files).files})
    if documents is None:
        if not every:
            return None
        held, documents = _drawn(every)
    else:
        sizes, texts = {len(one.text.encode()) for one in documents}, {one.text for one in documents}
        held = [path for path in every if path.stat().st_size in sizes and _text(path) in texts]
    if held and len(held) == len(every):
        raise InvalidInputError("expected a text that is a part of the files at the most, got all of them: name fewer")
    if held:
        give_claims(model, on_progress, without=held)
    return documents


def _drawn(every: Sequence[Path]) -> tuple[list[Path], list[Document]]:
    """Return files that are held out, and their beginnings."""
    long = [path for path in every if path.stat().st_size >= _LEAST and _text(path) is not None]
    if len(long) < _SHARE:
        raise InvalidInputError(
            f"expected {_SHARE} files or more of {_LEAST} bytes and more, to hold some out, got {len(long)}: name a "
            "text by --text"
        )
    chosen = random.Random(1)  # noqa: S311 - which files are held out is no secret
    held = sorted(chosen.sample(long, min(_MOST, len(long) // _SHARE)))
    return held, [Document(str(path), path.read_bytes()[:_BYTES].decode(errors="ignore")) for path in held]


def _text(path: Path) -> str | None:
    """Return the text of a file; None if it is none."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_bytes().decode()
    return None


@dataclass(frozen=True)
class Worth:
    """What files are worth at some places of a text.

    Attributes:
        alone: the bits a byte without them.
        beside: the bits a byte with them.
        gain: what they gain, in bits a byte, with its 95 % interval by document or block.
    """

    alone: float
    beside: float
    gain: Difference

    @classmethod
    def of(cls, positions: Positions, nats: Float[Tensor, " N"], within: Clusters) -> Worth | None:
        """Return what the files are worth; None if there are none, or fewer than two positions.

        Args:
            positions: the places, with what the files claim there.
            nats: the losses without files, in nats.
            within: the clusters of the positions.
        """
        if not positions.claims or len(positions) < 2:
            return None
        ours, size = beside(nats, positions.claims) / math.log(2), int(positions.sizes.sum())
        bare = nats / math.log(2)
        gain = paired(bare, ours, within, positions.sizes)
        return cls(bare.sum().item() / size, ours.sum().item() / size, gain)

    @property
    def percent(self) -> float:
        """How many percent fewer bits there are with the files."""
        return 100 * self.gain.mean / self.alone

    def figures(self) -> dict[str, Any]:
        """Return the bits a byte and the gain, as JSON has them."""
        gain = {"gain": self.gain.mean, "interval": [self.gain.low, self.gain.high]}
        return {"alone": self.alone, "beside": self.beside, **gain}


@dataclass(frozen=True)
class Beside:
    """What files add to an ensemble.

    Attributes:
        names: what the files are called.
        whole: what they are worth on the text.
        late: what behind the first 600 bytes of each document; None where that is not known.
        held_out: how many of the files the text is, each read without itself; 0 for another text.
        ratio: the time of a byte with the files over that without.
    """

    names: tuple[str, ...]
    whole: Worth
    late: Worth | None
    held_out: int
    ratio: float

    @property
    def pays(self) -> bool:
        """Whether the files' gain is shown, and is more than a larger model's for such a time."""
        shown = self.whole.gain.low > 0
        return shown and (self.ratio < SAME or self.whole.percent >= larger(self.ratio))

    def figures(self) -> dict[str, Any]:
        """Return the figures of all attributes, and whether they pay, as JSON has them."""
        return {
            "names": list(self.names),
            "worth_it": self.pays,
            "held_out": self.held_out,
            "time_ratio": self.ratio,
            **self.whole.figures(),
            "behind_header": self.late and self.late.figures(),
        }


def behind_header(positions: Positions) -> Int[Tensor, " k"]:
    """Return the numbers of the positions of a whole text that stand behind the first 600 bytes of their documents."""
    ends = torch.cat([positions.sizes[positions.document == k].cumsum(0) for k in positions.document.unique()])
    return (ends > HEADER).nonzero().squeeze(-1)
