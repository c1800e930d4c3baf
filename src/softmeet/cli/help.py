"""The text of ``--help``: options by group, in two columns that fit terminals and pipes of any width."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

# Help shows a command's groups of options in this order.
PANELS = (
    "Arguments", "Models", "Text", "Mixing", "Finding weights", "Sampling", "Structure", "Plan", "Address and access",
    "Limits", "Output", "Engine", "Advanced",
)  # fmt: skip
_NAMES = 26
# The parameters that --help shows of a command that has many; --help-all shows all of them.
_COMMON = {
    "named", "prompts", "questions", "out", "members", "ensembles", "rule", "rules", "weights", "vocabulary",
    "system", "colors", "max_new_tokens", "chat", "temperature", "seed", "text", "top", "html", "plan", "instead",
    "saved", "trace", "baseline", "folds", "table", "as_json", "how", "shots", "task", "host", "port", "ui",
    "api_key", "api_keys", "help_all",
}  # fmt: skip
_MANY = 12
# Where --help-all is noted, in what click keeps of a call.
ALL = "softmeet.help_all"


class GroupedHelp(TyperCommand):
    """A command of typer whose help shows its options by group (``rich_help_panel``)."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the command does; of one with many options the first paragraph and the example."""
        parts = str(self.help or "").split("\n\n")
        kept = [parts[0], *(part for part in parts[1:] if part.startswith("Example"))] if self._is_brief(ctx) else parts
        for part in kept:
            formatter.write("\n")
            with formatter.indentation():
                formatter.write_text(part)

    def _is_brief(self, ctx: Any) -> bool:
        return len(self.get_params(ctx)) > _MANY and not ctx.meta.get(ALL)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the groups of options to click's ``formatter``; of many options those that most people use."""
        every, brief = self.get_params(ctx), self._is_brief(ctx)
        shown = [p for p in every if p.name in _COMMON] if brief else every
        for title, own in grouped(shown):
            rows = [(spelling(p), _first_part(sentence(p)) if brief else sentence(p), default(p)) for p in own]
            formatter.write(f"\n{title}:\n{_two_columns(rows, formatter.width)}")


class Commands(TyperGroup):
    """A group of typer whose help shows each command with the whole first sentence of its help."""

    @property
    def visible(self) -> dict[str, Any]:
        """The commands that help shows, by name."""
        return {name: command for name, command in self.commands.items() if not command.hidden}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, and then the group's own options, to click's ``formatter``."""
        rows = [
            (name, _first_sentence(command.help), "") for name, command in self.commands.items() if not command.hidden
        ]
        formatter.write(f"\nCommands:\n{_two_columns(rows, formatter.width)}")
        rows = [(spelling(p), sentence(p), default(p)) for _, own in grouped(self.get_params(ctx)) for p in own]
        formatter.write(f"\nOptions:\n{_two_columns(rows, formatter.width)}")


def grouped(parameters: Iterable[Any]) -> list[tuple[str, list[Any]]]:
    """Return the parameters of a command that help shows, as (title of the group, its parameters), in help's order."""
    shown = sorted((p for p in parameters if not getattr(p, "hidden", False)), key=lambda p: PANELS.index(_panel(p)))
    return [(title, list(own)) for title, own in groupby(shown, _panel)]


def spelling(parameter: Any) -> str:
    """Return how a parameter is typed, such as ``-m, --member TEXT``, ``--ui/--no-ui`` or ``[PROMPTS]...``."""
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper() + "..." * (parameter.nargs == -1)
        return name if parameter.required else f"[{name}]"
    names = "/".join([", ".join(sorted(parameter.opts, key=len)), *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar or 'TEXT'}"


def sentence(parameter: Any) -> str:
    """Return the sentence of help on a parameter."""
    return str(parameter.help or "")


def default(parameter: Any) -> str:
    """Return a parameter's default as help shows it; an empty string if there is none to show."""
    if parameter.required:
        return "none; it has to be given" if parameter.param_type_name == "option" else ""
    shown, value = parameter.show_default, parameter.default
    if isinstance(shown, str):
        return shown
    if value is None or value is False or not shown:
        return ""
    return parameter.opts[0].lstrip("-") if value is True else str(value)


def _panel(parameter: Any) -> str:
    return "Arguments" if parameter.param_type_name == "argument" else parameter.rich_help_panel or "Advanced"


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def _first_part(text: str) -> str:
    """Return the first sentence, up to a sign after which it says more."""
    return re.split(r"(?<=[^.])[.;:] |[.]$", text)[0]


def _two_columns(rows: Iterable[tuple[str, str, str]], width: int) -> str:
    """Return lines with names at the left, and sentences with ``[default: …]`` at the right, broken at spaces only.

    Args:
        rows: (name, sentence, default or an empty string) of each; a name that is too long gets a line of its own.
        width: the number of characters that a line may have.
    """
    left = min(_NAMES, width // 3)
    console = Console(width=width, force_terminal=True, color_system="standard", highlight=False)
    with console.capture() as captured:
        for name, text, usual in rows:
            right = Text(text).append(f" [default: {usual}]" if usual else "", style="dim")
            lines = [*right.wrap(console, width - left - 4)]
            if len(name) > left:
                lines.insert(0, Text())
            for k, line in enumerate(lines or [Text()]):
                line.rstrip()
                console.print(Text.assemble("  ", ("" if k else name).ljust(left + 2 if line else 0), line))
    return captured.get()
