"""Heads that cannot be read, found before weights are loaded where possible."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from transformers import PreTrainedModel

from softmeet.engine.unread import AVERAGE, reader_of, unreadable
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.partial import LINEAR, known_of, require_known
from softmeet.members.heads import head_of
from softmeet.members.member import short
from softmeet.members.opaque import OpaqueHead
from softmeet.members.reader_model import ReaderModel

_log = logging.getLogger("softmeet")


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
