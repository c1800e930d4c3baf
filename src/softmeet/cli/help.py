"""What ``--help`` shows of a command, by typer and rich, and how the docs and ``softmeet config`` say the same."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from typer.core import TyperCommand

# Help shows a command's groups of options in this order.
PANELS = (
    "Arguments", "Models", "Text", "Mixing", "Finding weights", "Sampling", "Structure", "Plan", "Address and access",
    "Limits", "Output", "Engine", "Advanced",
)  # fmt: skip
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
    """A command of typer whose help shows, of many options, those that most people use; ``--help-all`` shows all."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, after hiding what only ``--help-all`` shows."""
        every: Any = [p for _, own in grouped(self.params) for p in own]
        self.params = every
        if len(self.params) >= _MANY and not ctx.meta.get(ALL):
            parts = str(self.help or "").split("\n\n")
            self.help = "\n\n".join([parts[0], *(part for part in parts[1:] if part.startswith("Example"))])
            for p in every:
                p.hidden, p.help = p.name not in _COMMON, re.split(r"(?<=[^.])[.;:] |[.]$", sentence(p))[0]
        super().format_help(ctx, formatter)


def grouped(parameters: Iterable[Any]) -> list[tuple[str, list[Any]]]:
    """Return the parameters of a command that help shows, as (title of the group, its parameters), in help's order."""
    return [(title, list(own)) for title, own in groupby(sorted(parameters, key=_place), _panel)]


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


def _place(parameter: Any) -> int:
    return PANELS.index(_panel(parameter))
