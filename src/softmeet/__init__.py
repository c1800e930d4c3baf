"""Sample from several language models as one.

>>> import softmeet
>>> ensemble = softmeet.Ensemble.from_pretrained("wide")
>>> ensemble.generate("In the beginning", max_new_tokens=5, do_sample=False)
' of the earth, and'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from softmeet._version import __version__
from softmeet.startup import few_spins, paused_collection, register_auto_classes

if TYPE_CHECKING:
    RULES: tuple[Rule, ...]
    """All rules that have a name: softmeet's own, those of packages, and those that were registered in this process."""

    from softmeet.decoders.base import Decoder, Decoding
    from softmeet.decoders.registry import decoder_names, register_decoder
    from softmeet.ensemble import Ensemble
    from softmeet.heads import SoftmaxHead
    from softmeet.members.files import Files
    from softmeet.members.member import Member
    from softmeet.members.passages import Passage
    from softmeet.members.registered import register_reader
    from softmeet.readers.reader import Reader
    from softmeet.rules.base import Rule
    from softmeet.rules.combine import combine
    from softmeet.rules.registry import register_rule, rule_names
    from softmeet.rules.settings import Settings
    from softmeet.rules.solution import Solution
    from softmeet.solvers.base import Status, StoppedBy
    from softmeet.solvers.clock import time_is_over, time_limit
    from softmeet.structured.structure import Structure

__all__ = [
    "RULES", "Decoder", "Decoding", "Ensemble", "Files", "Member", "Passage", "Reader", "Rule", "Settings",
    "SoftmaxHead", "Solution", "Status", "StoppedBy", "Structure", "__version__", "combine", "decoder_names",
    "register_decoder", "register_reader", "register_rule", "rule_names", "time_is_over", "time_limit",
]  # fmt: skip

# Loaded when first used, so that `softmeet --help` does not wait for torch and transformers.
_HOMES = {
    "Decoder": "softmeet.decoders.base",
    "Decoding": "softmeet.decoders.base",
    "Ensemble": "softmeet.ensemble",
    "Files": "softmeet.members.files",
    "Member": "softmeet.members.member",
    "Passage": "softmeet.members.passages",
    "Reader": "softmeet.readers.reader",
    "Rule": "softmeet.rules.base",
    "Settings": "softmeet.rules.settings",
    "SoftmaxHead": "softmeet.heads",
    "Solution": "softmeet.rules.solution",
    "Status": "softmeet.solvers.base",
    "StoppedBy": "softmeet.solvers.base",
    "Structure": "softmeet.structured.structure",
    "combine": "softmeet.rules.combine",
    "decoder_names": "softmeet.decoders.registry",
    "register_decoder": "softmeet.decoders.registry",
    "register_reader": "softmeet.members.registered",
    "register_rule": "softmeet.rules.registry",
    "rule_names": "softmeet.rules.registry",
    "time_is_over": "softmeet.solvers.clock",
    "time_limit": "softmeet.solvers.clock",
}

few_spins()
register_auto_classes()


def __getattr__(name: str) -> Any:
    if name == "RULES":  # anew each time, since rules can be registered
        return import_module("softmeet.rules.registry").all_rules()
    if name not in _HOMES:
        raise AttributeError(f"module 'softmeet' has no attribute {name!r}")
    with paused_collection():
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
