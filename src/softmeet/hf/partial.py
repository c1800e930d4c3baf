"""Members that tell the likeliest tokens alone, as models behind servers do, and what they can be combined by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.members.member import short
from softmeet.members.reader_model import ReaderModel
from softmeet.rules.settings import Settings

# The rule by which an unknown probability is bounded on both sides: it is at least 0.
LINEAR = "prob-mean"


def known_of(model: PreTrainedModel) -> int | None:
    """Return how many tokens of each prediction a member tells; None if it tells all."""
    known: int | None = model.reader.traits.known if isinstance(model, ReaderModel) else None
    return known


def require_known(settings: Settings, names: Sequence[str], models: Iterable[PreTrainedModel]) -> None:
    """Check that members which tell some tokens alone are combined by ``prob-mean``.

    What such a member does not tell is left out of its distribution, and the rest is taken for the whole.

    Raises:
        InvalidInputError: if they are combined otherwise: by a logarithm, a probability that is not known may be worth
            anything.
    """
    for name, model in zip(names, models, strict=True):
        if (known := known_of(model)) is not None and settings.rule.name != LINEAR:
            raise InvalidInputError(
                f"the rule {settings.rule.name} needs the probability of every token, and {short(name)} tells the "
                f"{known} likeliest alone: choose {LINEAR}, or ask for all, where the server tells them, by +top=all"
            )


def require_all(what: str, names: Sequence[str], models: Iterable[PreTrainedModel]) -> None:
    """Check that every member tells every token, which ``what`` needs.

    Raises:
        InvalidInputError: if one does not.
    """
    for name, model in zip(names, models, strict=True):
        if (known := known_of(model)) is not None:
            raise InvalidInputError(
                f"{what} needs the probability of every token, and {short(name)} tells the {known} likeliest alone: "
                "ask for all, where the server tells them, by +top=all"
            )
