"""Signatures and documentation of functions that take settings, made from the settings themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from softmeet.rules.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


def takes_settings(function: F) -> F:
    """Add all fields of :class:`Settings` to the signature and docstring of a function that takes ``**settings``.

    A decorator: it changes ``function`` itself, for ``help`` and editors only, and returns it. Fields that the function
    already has as parameters are not added.

    Raises:
        AssertionError: if the last parameter of ``function`` is not of the form ``**settings``.
    """
    signature = inspect.signature(function)
    *named, rest = signature.parameters.values()
    assert rest.kind is inspect.Parameter.VAR_KEYWORD, "the function has to take **settings"
    fields = {name: field for name, field in Settings.model_fields.items() if name not in signature.parameters}
    by_name = inspect.Parameter.KEYWORD_ONLY
    extra = [inspect.Parameter(name, by_name, default=field.get_default()) for name, field in fields.items()]
    function.__signature__ = signature.replace(parameters=[*named, *extra, rest])  # type: ignore[attr-defined]
    lines = [f"    {name}: {field.description}" for name, field in fields.items()]
    function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Settings:", *lines])
    return function
