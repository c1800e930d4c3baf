"""Checks of shapes and types that cost nothing where they are off.

jaxtyping's hook puts a decorator before every function of the packages that ``--jaxtyping-packages`` names. As it is,
it compiles each function's checks when the function is defined, and those of a function within another one at each call
of the outer one, whether checks are on or off: a tenth of the suite's time. And it keeps compiled modules under a name
that it has Python use by replacing a function for all threads: one that imports something else meanwhile may keep a
module with checks under the name of the one without, which then fails wherever there is no hook.
"""

from __future__ import annotations

import functools
import inspect
from importlib.machinery import SourceFileLoader
from sys import is_finalizing

import jaxtyping
from jaxtyping import _decorator, _import_hook

_decorated = jaxtyping.jaxtyped
_on = False


def _when_asked(fn, *, typechecker):
    """Decorate a function so that its checks are compiled at the first call at which they are on."""
    if not inspect.isfunction(fn):
        return _decorated(fn, typechecker=typechecker)
    if "<locals>" in fn.__qualname__:
        return fn
    # At the end of the interpreter, when nothing can be compiled any more, names of modules may be gone.
    checked, is_over = None, is_finalizing

    @functools.wraps(fn)
    def call(*args, **kwargs):
        nonlocal checked
        if not _on or is_over():
            return fn(*args, **kwargs)
        checked = checked or _decorated(fn, typechecker=typechecker)
        return checked(*args, **kwargs)

    return call


def _compiled(self, fullname):
    """Compile a module with the checks in it, and keep nothing."""
    path = self.get_filename(fullname)
    return self.source_to_code(self.get_data(path), path)


def install():
    """Have the hook decorate in this way; to be called before anything is imported that it decorates."""

    def jaxtyped(fn=None, *, typechecker):
        return (
            functools.partial(_when_asked, typechecker=typechecker)
            if fn is None
            else _when_asked(fn, typechecker=typechecker)
        )

    jaxtyping.jaxtyped = _decorator.jaxtyped = jaxtyped
    _import_hook._JaxtypingLoader.get_code = _compiled
    _import_hook._JaxtypingLoader.exec_module = SourceFileLoader.exec_module


def only(on):
    """Switch the checks on or off."""
    global _on
    _on = on
    jaxtyping.config.update("jaxtyping_disable", not on)
