"""Objects that are checked when they are made and never change after: rules with their options, and settings."""

from __future__ import annotations

import types
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from softmeet.errors import InvalidInputError


class Frozen(BaseModel):
    """A pydantic model that cannot be changed, and whose errors are softmeet's.

    Raises:
        InvalidInputError: a field is unknown or has a value that it does not take; the message names both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._explained(error) from None

    @classmethod
    def _explained(cls, error: ValidationError) -> InvalidInputError:
        first = error.errors()[0]
        name, reason = str(first["loc"][0]), first.get("ctx", {}).get("error")
        if isinstance(reason, InvalidInputError):
            said = str(reason)
            return InvalidInputError(f"expected {name} {said}") if said.startswith("to be ") else reason
        if first["type"] == "extra_forbidden":
            return unknown(f"{getattr(cls, 'name', 'an ensemble')} has no option {name!r}", name, cls.model_fields)
        message = first["msg"].removeprefix("Input should be ")
        whose = f" of {cls.name}" if hasattr(cls, "name") else ""
        return InvalidInputError(f"expected {name}{whose} to be {message}, got {first['input']!r}")


def unknown(what: str, name: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> InvalidInputError:
    """Make the error for a name that is none: the nearest known one, and all of them.

    Args:
        what: the sentence to begin with, such as ``unknown rule 'mete'``.
        name: what was given.
        known: the names that there are.
    """
    near = get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    expected = f"expected one of {', '.join(known)}" if known else "it has none"
    return InvalidInputError(f"{what}: {hint}{expected}")


def takes(field: FieldInfo, kind: type) -> bool:
    """Say whether a field takes values of some kind: ``bool``, ``int``, ``float``, ``tuple`` and so on."""
    return kind in _kinds(field.annotation)


def _kinds(annotation: Any) -> set[Any]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {origin or annotation}
