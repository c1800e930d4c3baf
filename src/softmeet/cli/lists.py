"""``--members A B C``: options that take every word up to the next option, which click alone does not know."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

_LISTS = ("--members", "-m", "--text", "-t")


class ListCommand(TyperCommand):
    """A command whose ``--members`` and ``--text`` may be followed by several values, as well as repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further value."""
        spread: list[str] = []
        current: str | None = None
        for word in args:
            if word.startswith("-") and word != "-":
                current = word if word in _LISTS else None
                spread.append(word)
            elif current and spread[-1] != current:
                spread += [current, word]
            else:
                spread.append(word)
        return super().parse_args(ctx, spread)
