"""Older names of an ensemble's methods, which go on working until 0.3.0."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from softmeet.hf.combining import Combiner

COMBINER_METHODS = ("solve_rows", "solve_in_chunks", "combine_rows", "own_logits", "own_log_probs", "banded_heads")


def moved_to_combiner(name: str) -> Callable[..., Any]:
    """Return a method for the class of ensembles that warns, and then calls ``model.combiner.NAME`` in its place.

    The method passes its arguments on and returns that call's result. Without ``settings`` it passes the model's own,
    without their gate, as this method did before. The warning is a ``DeprecationWarning`` at every call.

    Args:
        name: the method's name, one of :data:`COMBINER_METHODS`.
    """

    def call(model: Any, *arguments: Any, **options: Any) -> Any:
        warnings.warn(f"{name} is model.combiner.{name}; this name goes with 0.3.0", DeprecationWarning, stacklevel=2)
        signature = inspect.signature(getattr(Combiner, name))
        if "settings" in signature.parameters.keys() - signature.bind_partial(model, *arguments, **options).arguments:
            options["settings"] = model.settings.ungated()
        return getattr(model.combiner, name)(*arguments, **options)

    return call
