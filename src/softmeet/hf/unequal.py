"""A word of warning where members of different strength get equal weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from softmeet.members.member import short
from softmeet.members.reader_model import ReaderModel
from softmeet.rules.settings import Settings

_log = logging.getLogger("softmeet.weights")
# A larger model has more than so many times the parameters of a smaller one. Of tiny models most are embeddings.
_RATIO, _TINY = 2.0, 10_000_000


@contextmanager
def unwarned() -> Iterator[None]:
    """Enter a context without the warning, for what measures how good members are."""
    before, _log.disabled = _log.disabled, True
    try:
        yield
    finally:
        _log.disabled = before


def parameters(model: PreTrainedModel) -> int | None:
    """Return the number of a member's parameters; None of a reader that does not tell it."""
    if isinstance(model, ReaderModel):
        told: int | None = getattr(model.reader, "parameters", None)
        return told
    return int(sum(parameter.numel() for parameter in model.parameters()))


def warn_of_unequal(names: Sequence[str], models: Sequence[PreTrainedModel], settings: Settings) -> None:
    """Log a warning if no weights are given and one member has more than twice the parameters of another.

    An average with equal weights loses to the better member where members differ by more than 0.06 bits a byte
    (docs/reference/results.md), which models of so different sizes mostly do.
    """
    sizes = {name: size for name, model in zip(names, models, strict=True) if (size := parameters(model))}
    large, small = (pick(sizes, key=sizes.__getitem__, default="") for pick in (max, min))
    if settings.weights is not None or not sizes or sizes[large] < max(_TINY, _RATIO * sizes[small]):
        return
    _log.warning(
        "equal weights, but %s has %.1f times the parameters of %s: such a mix is mostly worse than the larger model "
        "alone; softmeet advise says it of your text, and weights (--weights) settle it",
        short(large), sizes[large] / sizes[small], short(small),
    )  # fmt: skip
