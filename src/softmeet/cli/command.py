"""How a command of ``softmeet`` reads its words: older spellings too, and what is said overrules what a file says."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from softmeet.cli.old_forms import modern_words

# Commands whose options took several values in a row.
_SEVERAL = ("trace", "evaluate", "fit", "pretrained")


class Command(TyperCommand):
    """A command whose lists repeat their option, and whose rules may hold settings."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read older spellings as today's: what comes after an option's value may be an argument."""
        has_arguments = any(p.param_type_name == "argument" for p in self.params)
        several = self.name in _SEVERAL and not (has_arguments and args[:1] and args[0].startswith("-"))
        return super().parse_args(ctx, modern_words(args, several=several))

    def invoke(self, ctx: Any) -> Any:
        """Let a rule on the command line overrule the settings of a configuration file that it names itself."""
        rule = ctx.params.get("rule")
        if isinstance(rule, str) and ":" in rule and _said(ctx, "rule"):
            from softmeet.rules.settings import parse_rule

            for name in parse_rule(rule)[1]:
                if name in ctx.params and not _said(ctx, name):
                    ctx.params[name] = None
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments come first, as in the examples."""
        options, *arguments = super().collect_usage_pieces(ctx)
        return [*arguments, options]


def _said(ctx: Any, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
