"""Write docs/reference/cli.md from the commands' own --help: python tools/update_cli_docs.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from softmeet.cli import help as cli_help
from softmeet.cli.main import app

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
INTRODUCTION = """# The command line

Every command of softmeet with all its options: what `softmeet COMMAND --help` says, in one page that can be searched.
`-m` names the members, `--rule` says how they are combined; without `-m`, small bundled models are used.

| to | command |
|---|---|
{commands}

A list repeats its option: `-m A -m B`, `--rule A --rule B`. Numbers in a list have commas, `--trust 1,0.3`; in a rule,
which may hold any setting, slashes: `--rule meet:trust=1/0.3:pool=prob-mean`. A setting is named once. `--config
FILE.yaml` gives any of a command's flags under their own names; what stands on the command line wins. An error is one
line on stderr and exit code 2; the exit code is 130 after Ctrl-C, and 141, without a word, where the reader of a pipe
has gone, as in `softmeet generate "In the beginning" | head -1`. Texts are UTF-8 in any locale, as arguments, files,
stdin and output. A terminal is shown escapes and other controls in what models write, spelled as `\\x1b`; a pipe gets
them. A table that does not fit the terminal is printed line by line. `softmeet --install-completion` sets up your
shell.
"""


def page() -> str:
    """The page as it should be."""
    group: Any = get_command(app)
    visible = {name: command for name, command in group.commands.items() if not command.hidden}
    rows = [
        f"| {command.help.splitlines()[0].partition('.')[0]} | [`softmeet {name}`](#softmeet-{name}) |"
        for name, command in visible.items()
    ]
    introduction = INTRODUCTION.format(commands="\n".join(rows))
    return "\n".join([introduction, *_parts(visible)])


def _parts(commands: dict[str, Any]) -> Iterator[str]:
    for name, command in commands.items():
        yield f"## softmeet {name}\n\n{command.help}\n"
        for title, own in cli_help.grouped(command.params):
            rows = [f"| {_typed(p)} | {cli_help.sentence(p)} | {cli_help.default(p)} |" for p in own]
            yield f"| {title.lower()} | what it does | default |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _typed(parameter: Any) -> str:
    return f"`{cli_help.spelling(parameter)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
