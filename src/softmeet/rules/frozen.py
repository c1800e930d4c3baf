"""The base class of rules and settings: objects that are checked when they are made and never change afterwards."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from softmeet.errors import InvalidInputError, nearest


class Frozen(BaseModel):
    """An immutable pydantic model that raises softmeet's errors in place of pydantic's.

    A field is described by the docstring below it, or as pydantic's fields are in general: ``Field(description=…)``.

    Raises:
        InvalidInputError: if a field is unknown or its value is not allowed; the message names field and value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Put the descriptions of fields, which may be docstrings of several lines, in one line each."""
        for field in cls.model_fields.values():
            field.description = field.description and " ".join(field.description.split())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._explained(error) from None

    @classmethod
    def _explained(cls, error: ValidationError) -> InvalidInputError:
        first = error.errors()[0]
        # What several fields break together has no place.
        name, reason = str(next(iter(first["loc"]), "")), first.get("ctx", {}).get("error")
        if isinstance(reason, InvalidInputError):
            said = str(reason)
            return InvalidInputError(f"expected {name} {said}") if said.startswith("to be ") else reason
        if first["type"] == "extra_forbidden":
            return unknown(f"{getattr(cls, 'name', 'an ensemble')} has no option {name!r}", name, cls.model_fields)
        message = first["msg"].removeprefix("Input should be ")
        whose = f" of {cls.name}" if hasattr(cls, "name") else ""
        return InvalidInputError(f"expected {name}{whose} to be {message}, got {_shown(first['input'])}")


def _shown(value: Any) -> str:
    """Return ``repr(value)``; of integers with very many digits, of which Python makes none, the type's name."""
    try:
        return repr(value)
    except ValueError:
        return f"a large {type(value).__name__}"


def unknown(what: str, name: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> InvalidInputError:
    """Return the error for an unknown name, whose message lists the known names and suggests the nearest one.

    Args:
        what: the beginning of the message, such as ``unknown rule 'mete'``.
        name: the unknown name, as it was given.
        known: the known names.
    """
    expected = f"expected one of {', '.join(known)}" if known else "it has none"
    return InvalidInputError(f"{what}: {nearest(name, known)}{expected}")


def takes(field: FieldInfo, kind: type) -> bool:
    """Return whether a pydantic field's annotation, or a part of its union, is the class ``kind`` or ``kind[…]``."""
    whole = field.annotation
    parts = get_args(whole) if get_origin(whole) in (Union, types.UnionType) else (whole,)
    return any((get_origin(part) or part) is kind for part in parts)
