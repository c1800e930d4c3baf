"""Checks of shapes and types that cost nothing where they are off.

jaxtyping's hook puts a decorator before every function of the packages that ``--jaxtyping-packages`` names. As it is,
it compiles each function's checks when the function is defined, and those of a function within another one at each call
of the outer one, whether checks are on or off: a tenth of the suite's time.
"""

from __future__ import annotations

import functools
import inspect

import jaxtyping
from jaxtyping import _decorator

_decorated = jaxtyping.jaxtyped


def _when_asked(fn, *, typechecker):
    """Decorate a function so that its checks are compiled at the first call at which they are on."""
    if not inspect.isfunction(fn):
        return _decorated(fn, typechecker=typechecker)
    if "<locals>" in fn.__qualname__:
        return fn
    checked = None

    @functools.wraps(fn)
    def call(*args, **kwargs):
        nonlocal checked
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        checked = checked or _decorated(fn, typechecker=typechecker)
        return checked(*args, **kwargs)

    return call


def install():
    """Have the hook decorate in this way; to be called before anything is imported that it decorates."""

    def jaxtyped(fn=None, *, typechecker):
        return (
            functools.partial(_when_asked, typechecker=typechecker)
            if fn is None
            else _when_asked(fn, typechecker=typechecker)
        )

    jaxtyping.jaxtyped = _decorator.jaxtyped = jaxtyped


def only(on):
    """Switch the checks on or off."""
    jaxtyping.config.update("jaxtyping_disable", not on)
