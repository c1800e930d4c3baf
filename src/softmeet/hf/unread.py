"""Heads that cannot be read: which rules and settings they rule out, found before weights are loaded where possible."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedModel

from softmeet.errors import UnsupportedHeadError
from softmeet.hf.configuration import EnsembleConfig
from softmeet.members.heads import head_of
from softmeet.members.opaque import Head, OpaqueHead
from softmeet.rules.registry import all_rules
from softmeet.rules.settings import Settings

# The default rule of ensembles without heads that can be read: over bytes, or of members whose heads cannot be read.
AVERAGE = "logit-mean"
_log = logging.getLogger("softmeet")


def averages() -> str:
    """Return the names of all rules that are averages, joined by "or"."""
    return " or ".join(one.name for one in all_rules() if one.is_average)


def reader_of(settings: Settings) -> str | None:
    """Return what in the settings reads heads, such as ``"the rule meet"``; None if nothing does."""
    if settings.rule.reads_heads:
        return f"the rule {settings.rule.name}"
    set_ = {"bands": settings.bands > 1, "rank": settings.rank is not None, "free_radial": settings.free_radial}
    return next((f"the setting {name}" for name, given in set_.items() if given), None)


def require_read(settings: Settings, names: Sequence[str], heads: Sequence[Head]) -> None:
    """Check that the settings read no head that cannot be read.

    Args:
        settings: the settings.
        names: the members' names, for the message.
        heads: their heads, in the same order.

    Raises:
        UnsupportedHeadError: if the rule, or ``bands``, ``rank`` or ``free_radial``, reads such a head.
    """
    reader = reader_of(settings)
    for name, head in zip(names, heads, strict=True):
        if reader is not None and isinstance(head, OpaqueHead):
            raise _unreadable(reader, name, head.why, head.remedy)


def _unreadable(reader: str, name: str, why: str, remedy: str) -> UnsupportedHeadError:
    leave = "" if reader.startswith("the rule") else "leave it out, and "
    return UnsupportedHeadError(
        f"{reader} reads heads (output layers), and that of {name} {why}: {leave}choose {averages()}"
        + (f", or {remedy}" if remedy else "")
    )


def refuse_quantised(config: EnsembleConfig, quantised: Mapping[str, str], *, any_average: bool = False) -> None:
    """Check members' configurations before weights are loaded: rules that read heads need unquantised ones.

    Args:
        config: the ensemble's configuration.
        quantised: for each member whose configuration says that its head is quantised, how: a name such as "gptq".
        any_average: True to set the rule of ``config`` to ``logit-mean`` instead, with a warning.

    Raises:
        UnsupportedHeadError: if there are such members, the settings read heads, and ``any_average`` is False.
    """
    for name, method in quantised.items():
        _settle(config, name, f"is quantised ({method})", "load a checkpoint whose head is not", any_average)


def reading(config: EnsembleConfig, *, any_average: bool = False) -> Callable[[str, PreTrainedModel], None]:
    """Return a function of a member's name and model, for ``load_members`` to call once the member is loaded.

    It raises an UnsupportedHeadError if the settings of ``config`` read heads, and the member's cannot be read; with
    ``any_average``, it sets the rule of ``config`` to ``logit-mean`` instead, with a warning.
    """

    def check(name: str, model: PreTrainedModel) -> None:
        if reader_of(config.settings) is not None and isinstance(head := head_of(model), OpaqueHead):
            _settle(config, name, head.why, head.remedy, any_average)

    return check


def _settle(config: EnsembleConfig, name: str, why: str, remedy: str, any_average: bool) -> None:
    reader = reader_of(config.settings)
    if reader is None:
        return
    if not any_average or reader_of(config.settings.changed(rule=AVERAGE)) is not None:
        raise _unreadable(reader, name, why, remedy)
    config.rule = AVERAGE
    _log.warning("combined by %s, as the head (output layer) of %s cannot be read: it %s", AVERAGE, name, why)
