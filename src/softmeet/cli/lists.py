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
                option, _, value = word.partition("=")
                current = option if option in _LISTS else None
                spread += [option, value] if current and value else [word]
            elif current and spread[-1] != current:
                spread += [current, word]
            else:
                spread.append(word)
        return super().parse_args(ctx, spread)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments come first: behind options they could be taken for a further value."""
        options, *arguments = super().collect_usage_pieces(ctx)
        return [*arguments, options]
