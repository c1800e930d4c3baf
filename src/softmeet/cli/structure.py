"""Flags for what a generated text has to be, and the structure that they ask for."""

from __future__ import annotations

from pathlib import Path

from softmeet.cli.flags import Flags, flag_of, optional
from softmeet.cli.texts import file_text
from softmeet.errors import InvalidInputError
from softmeet.structured.structure import Structure


class StructureFlags(Flags, panel="Structure"):
    """Flags for what a text has to be; at most one of them can be given."""

    json_schema: str | None = optional(
        "Write a JSON document of this JSON schema: a file, or the schema itself.", metavar="PATH|TEXT"
    )
    regex: str | None = optional("Write a text that matches this regular expression as a whole.")
    choice: list[str] | None = optional("Write one of the texts that are given so; repeat it for each.", "--choice")
    grammar: Path | None = optional("Write a text of the grammar in this file, in llguidance's variant of Lark.")

    def structure(self) -> Structure | None:
        """Return the structure that the flags ask for, compiled; None if none is given.

        Raises:
            InvalidInputError: if more than one is given, or one cannot be used.
            OSError: if a file cannot be read.
        """
        given = {name: value for name, value in vars(self).items() if value}
        if len(given) > 1:
            spelled = " and ".join(map(flag_of, given))
            raise InvalidInputError(f"expected one structure, got {spelled}: leave out all but one")
        if not given:
            return None
        ((kind, value),) = given.items()  # flags are named as the ways to make a structure
        if kind == "grammar" or (kind == "json_schema" and not value.lstrip().startswith("{")):
            value = file_text(value)
        made: Structure = getattr(Structure, kind)(value)
        return made
