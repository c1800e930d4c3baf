"""Heads that cannot be read, found before weights are loaded where possible; members that tell some tokens alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from transformers import PreTrainedModel

from softmeet.engine.unread import AVERAGE, reader_of, unreadable
from softmeet.errors import InvalidInputError
from softmeet.hf.configuration import EnsembleConfig
from softmeet.members.heads import head_of
from softmeet.members.member import short
from softmeet.members.opaque import OpaqueHead
from softmeet.members.reader_model import ReaderModel
from softmeet.rules.settings import Settings

_log = logging.getLogger("softmeet")
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
    if settings.rule.name != LINEAR:
        require_all(f"the rule {settings.rule.name}", names, models, f"choose {LINEAR}, or ")


def require_all(what: str, names: Sequence[str], models: Iterable[PreTrainedModel], advice: str = "") -> None:
    """Check that every member tells every token, which ``what`` needs; ``advice`` is what else can be done.

    Raises:
        InvalidInputError: if one does not.
    """
    for name, model in zip(names, models, strict=True):
        if (known := known_of(model)) is not None:
            raise InvalidInputError(
                f"{what} needs the probability of every token, and {short(name)} tells the {known} likeliest alone: "
                f"{advice}ask for all, where the server tells them, by +top=all"
            )


def refuse_quantised(config: EnsembleConfig, quantised: Mapping[str, str], *, any_average: bool = False) -> None:
    """Check members' configurations before weights are loaded: rules that read heads need unquantised ones.

    Args:
        config: the ensemble's configuration.
        quantised: for each member whose configuration says that its head is quantised, how: a name such as "gptq".
        any_average: True to set the rule of ``config`` to ``logit-mean`` instead.

    Raises:
        UnsupportedHeadError: if there are such members, the settings read heads, and ``any_average`` is False.
    """
    for name, method in quantised.items():
        _settle(config, name, f"is quantised ({method})", "load a checkpoint whose head is not", any_average)


def reading(config: EnsembleConfig, *, any_average: bool = False) -> Callable[[str, PreTrainedModel], None]:
    """Return a function of a member's name and model, for ``load_members`` to call once the member is loaded.

    It raises an UnsupportedHeadError if the settings of ``config`` read heads, and the member's cannot be read; with
    ``any_average``, it sets the rule of ``config`` to ``logit-mean`` instead.
    """

    def check(name: str, model: PreTrainedModel) -> None:
        if (known := known_of(model)) is not None and any_average and config.rule != LINEAR:
            config.rule = LINEAR
            _log.warning("mixed by %s, as %s tells the %s likeliest tokens alone", LINEAR, short(name), known)
        require_known(config.settings, [name], [model])
        # Of a GGUF file's head, that a rule reads it has to be said.
        if isinstance(model, ReaderModel) and reader_of(config.settings) is not None and not any_average:
            model.open_head()
        if reader_of(config.settings) is not None and isinstance(head := head_of(model), OpaqueHead):
            _settle(config, name, head.why, head.remedy, any_average)

    return check


def _settle(config: EnsembleConfig, name: str, why: str, remedy: str, any_average: bool) -> None:
    reader = reader_of(config.settings)
    if reader is None:
        return
    if not any_average or reader_of(config.settings.changed(rule=AVERAGE)) is not None:
        raise unreadable(reader, name, why, remedy)
    config.rule = AVERAGE
