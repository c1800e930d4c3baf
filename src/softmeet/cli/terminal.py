"""What reaches a terminal: texts of models, files and servers, in which it is given nothing to obey."""

from __future__ import annotations

import logging
import re
from typing import Any

from rich.console import Console
from rich.text import Text

# C0 but for tab and line feed, DEL, C1 (also as bytes that are not UTF-8, in names of files), and all that changes the
# direction of writing.
_OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\udc80-\udc9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    r"""Return a text with every character that a terminal obeys, and does not show, as Python spells it.

    Example:
        >>> print(harmless("\x1b[31mred"))
        \x1b[31mred
    """
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


class PlainConsole(Console):
    """A console that prints strings as :func:`harmless` has them, without markup or emoji; a rich ``Text`` as it is."""

    def __init__(self, **given: Any) -> None:
        super().__init__(markup=False, emoji=False, **given)

    def render_str(self, text: str, **how: Any) -> Text:
        """Return a string as rich prints it, which would leave out some of its controls, and print others."""
        return super().render_str(harmless(text), **how)


class HarmlessFormatter(logging.Formatter):
    """A formatter whose records are :func:`harmless`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return what is printed of a record, with its controls spelled."""
        return harmless(super().format(record))


def write(console: Console, text: str, style: str = "") -> None:
    """Write at once what a model wrote: on a terminal :func:`harmless`, in a style if there is one; else as it is."""
    if style and console.is_terminal:
        console.print(Text(harmless(text), style=style), end="", soft_wrap=True)
    else:
        console.file.write(harmless(text) if console.file.isatty() else text)
    console.file.flush()
