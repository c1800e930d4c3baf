"""The forms of a union of tokens: all of them, the likeliest of each member, or as others' code has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from softmeet.errors import InvalidInputError

_FORMS = "union, union:k=10, union:as=gac, union:k=10:as=unite"
# UniTE's code takes so many.
_UNITE = 10


@dataclass(frozen=True)
class UnionForm:
    """What stands behind ``union`` in the name of a vocabulary.

    Attributes:
        k: of each member so many of its likeliest strings make the union, anew at each step; None for all strings.
        published: whose code is followed in all that it does; None for softmeet's own union.
    """

    k: int | None = None
    published: Literal["gac", "unite"] | None = None

    @classmethod
    def parse(cls, vocabulary: str) -> UnionForm:
        """Return the form that a vocabulary's name says.

        Raises:
            InvalidInputError: if it is none.

        Example:
            >>> UnionForm.parse("union:k=5")
            UnionForm(k=5, published=None)
            >>> UnionForm.parse("union:as=unite")
            UnionForm(k=10, published='unite')
        """
        name, *parts = vocabulary.split(":")
        given = dict(part.partition("=")[::2] for part in parts)
        k, published = given.pop("k", None), given.pop("as", None)
        number = int(k) if k is not None and k.isdecimal() else None
        right = name == "union" and not given and len(parts) == (k is not None) + (published is not None)
        if not right or (k is not None and not number) or published not in (None, "gac", "unite"):
            raise InvalidInputError(f"expected a union of tokens as {_FORMS}, k from 1, got {vocabulary!r}")
        if published == "gac":
            if number is not None:
                raise InvalidInputError(f"GaC's code takes all tokens: leave out k={k}, or take union:k={k}:as=unite")
            return cls(None, "gac")
        return cls(number or _UNITE, "unite") if published == "unite" else cls(number)

    @property
    def is_joint(self) -> bool:
        """Whether what a member says of a string depends on the other members, too."""
        return self.k is not None
