"""The model of which all objects in requests are made, and what becomes of fields that it does not know."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

# Is told the name of each unknown field that is passed over; where it is None, unknown fields are refused.
PASSED_OVER: ContextVar[Callable[[str], None] | None] = ContextVar("passed over", default=None)
# The most fields of an object; no object that is known has half of them.
_MOST_FIELDS = 64
_log = logging.getLogger("softmeet.server")
# The most lines, so that no client fills the log; and which names are shown, as others may hold what nobody should log.
_LINES = 100
_SHOWN = re.compile(r"[\w.:/@-]{1,64}", re.ASCII)


def few(value: Any, most: int) -> Any:
    """Return a value, unless it is an object of more than so many names, before any of them is looked at."""
    if isinstance(value, dict) and len(value) > most:
        raise PydanticCustomError("too_long", "Dictionary should have at most {most} items", {"most": most})
    return value


class Strict(BaseModel):
    """A model that refuses unknown fields, unless they are passed over, conversions between types, NaN and infinities.

    Attributes:
        is_ours: whether unknown fields are refused in any case, as nobody else has an object of this kind.
        matter: the unknown fields that are refused in any case if they hold something.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    is_ours: ClassVar[bool] = False
    matter: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _of_known_fields(cls, value: Any) -> Any:
        """Return an object without the unknown fields that are passed over; refuse one of many fields by one error."""
        few(value, _MOST_FIELDS)
        tell = PASSED_OVER.get()
        if tell is None or cls.is_ours or not isinstance(value, dict):
            return value
        unknown = {name: own for name, own in value.items() if name not in _names(cls)}
        passed = [name for name, own in unknown.items() if not (own and name in cls.matter)]
        for name in passed:
            if value[name] is not None:
                tell(name)
        return {name: own for name, own in value.items() if name not in passed}


@cache
def _names(kind: type[Strict]) -> frozenset[str]:
    """Return the names of a model's fields, as requests have them."""
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


class PassedOver:
    """The fields and models that are passed over, each of which is told once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def field(self, name: str) -> None:
        """Take note of a field that a request has, and that is ignored."""
        self._tell(name, f"requests have the field {name}, which is unknown here and ignored; --strict refuses it")

    def model(self, name: str, answering: str) -> None:
        """Take note of a model that is not served, and of the one that answers in its place."""
        self._tell(name, f"requests ask for the model {name}, and {answering} answers; --strict refuses them")

    def _tell(self, name: str, line: str) -> None:
        if _SHOWN.fullmatch(name) and line not in self._told and len(self._told) < _LINES:
            self._told.add(line)
            _log.warning(line)
