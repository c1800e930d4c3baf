"""softmeet samples from several language models as one.

>>> import softmeet
>>> ensemble = softmeet.Ensemble.from_pretrained("wide")
>>> ensemble.generate("In the beginning", max_new_tokens=20)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from softmeet._auto import register
from softmeet._version import __version__

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.heads import SoftmaxHead
    from softmeet.rules.combine import combine
    from softmeet.rules.registry import RULES
    from softmeet.rules.solution import Solution
    from softmeet.solvers.base import Status

__all__ = ["RULES", "Ensemble", "SoftmaxHead", "Solution", "Status", "__version__", "combine"]

# Loaded when first used, so that `softmeet --help` does not wait for torch and transformers.
_HOMES = {
    "Ensemble": "softmeet.ensemble",
    "RULES": "softmeet.rules.registry",
    "SoftmaxHead": "softmeet.heads",
    "Solution": "softmeet.rules.solution",
    "Status": "softmeet.solvers.base",
    "combine": "softmeet.rules.combine",
}


register()
del register


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'softmeet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
