"""``softmeet methods``: what can be combined with what, and where it is from."""

from __future__ import annotations

import json as writing
from importlib.metadata import entry_points
from typing import Annotated

import typer

from softmeet.cli.progress import working
from softmeet.cli.tables import out, print_table

# What members are compared over, by the value of --vocabulary.
VOCABULARIES = {
    "tokens": ("the tokens that members share", ""),
    "bytes": ("the bytes of a text, for members with any tokenizers", "https://arxiv.org/abs/2410.09303"),
    "union": ("the union of the members' tokens, to write alone", "https://arxiv.org/abs/2406.12585"),
    "union:k=10": ("the union of each member's likeliest tokens", "https://arxiv.org/abs/2410.03777"),
    "union:as=gac": ("GaC as its code has it", "https://github.com/yaoching0/GaC"),
    "union:k=10:as=unite": ("UniTE as its code has it", "https://github.com/starrYYxuan/UniTE"),
}
GATES = {
    "unsure": ("the first member answers alone where it is sure: unsure:T, T a probability", ""),
    "disagreement": ("the average answers where members agree: disagreement:T, T in nats", ""),
    "safe": (
        "the first member answers alone where members agree, or one would write across the place: safe:T",
        "https://arxiv.org/abs/2510.15346",
    ),
    "auto": ("disagreement:0.08 for meet with finite trusts, else none: the default", ""),
}


def methods(json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False) -> None:
    """List the ways to mix models, published ones among them, with their sources.

    A method is a vocabulary, a rule, a gate and a decoder.

    Example: softmeet methods
    """
    with working("loading softmeet"):
        from softmeet.decoders.registry import DECODERS
        from softmeet.rules.gates import GROUP
        from softmeet.rules.registry import all_rules

    parts = {
        "vocabulary": [(name, *said) for name, said in VOCABULARIES.items()],
        "rule": [(one.name, one.summary, one.reference) for one in all_rules()],
        "gate": [(name, *said) for name, said in GATES.items()]
        + [(entry.name, f"by {entry.value}", "") for entry in entry_points(group=GROUP)],
        "decoder": [(one.name, one.summary, one.reference) for one in DECODERS.every()],
    }
    rows = [[kind, *own] for kind, some in parts.items() for own in some]
    if json:
        names = ("kind", "name", "what", "reference")
        typer.echo(writing.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=1))
        return
    print_table(out(), ("", "name", "what it does", "from"), [rows], texts=(0, 1, 2, 3))
    typer.echo("softmeet generate PROMPT --vocabulary V --rule R --gate G --decoder D")
