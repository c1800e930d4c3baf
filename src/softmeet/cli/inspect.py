"""``softmeet inspect``: show a text token by token, coloured by how much the rule had to correct the members."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import typer
from pydantic_core import to_jsonable_python
from rich.text import Text

from softmeet.cli import options
from softmeet.cli.flags import Flags, argument, flag, flags, optional, switch
from softmeet.cli.messages import err
from softmeet.cli.tables import out, print_table
from softmeet.cli.terminal import harmless
from softmeet.cli.texts import argument_text, file_text, require_new
from softmeet.errors import InvalidInputError
from softmeet.rules.endings import endings

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.hf import TokenReport
    from softmeet.hf.inspected import GroupReport

# The endings of files of text.
_TEXTS = (".txt", ".md", ".rst", ".html", ".tex")


class PageFlags(Flags, panel="Output"):
    """Flags for what is shown of a text, and where."""

    top: int = flag(5, "How many of each distribution's likeliest tokens to list, on the page and in JSON.", min=1)
    as_json: bool = switch("Print one JSON document on stdout.", "--json")
    html: Path | None = optional("Write a self-contained HTML page to this path.")
    force: bool = switch("Overwrite the file of --html if it exists.")


@flags()
def inspect(
    *,
    named: list[str] | None = argument(
        "The text itself; behind it, or with --text alone, models as -m takes them.", metavar="TEXT [MODEL]..."
    ),
    text: str | None = optional(
        "The text, in place of the first argument; or a UTF-8 file with it.", "--text", "-t", panel="Text"
    ),
    members: options.Members = None,
    loading: options.LoadingFlags,
    shown: PageFlags,
    **settings: Any,
) -> None:
    """Show how likely each model, and all together, thought every token of a text, and what mixing changed.

    Example: softmeet inspect "And the king said unto his daughter" wide/gpt2 wide/llama --html page.html
    """
    html = shown.html
    require_new(shown.force, *filter(None, [html]))
    every = [*(named or ()), *(members or ())]
    if text is None:
        if not named:
            raise InvalidInputError('expected a text, as in softmeet inspect "And the king said" a.gguf b.gguf')
        text = argument_text(every.pop(0))
    else:
        options.require_models(every, "leave it out, or --text")
        if not _is_file(text) and Path(text).suffix in _TEXTS and " " not in text:
            raise InvalidInputError(f"there is no file {text}: a text that is called so stands before the models")
        text = file_text(text) if _is_file(text) else argument_text(text)
    ensemble = loading.ensemble(every, settings)
    reports = ensemble.inspect(text, shown.top)
    facts = _facts(ensemble, text, reports)
    if html is not None:
        from softmeet.evaluation.files import write_text

        write_text(html, _page(facts))
        err.print(f"written to {html}")
    if shown.as_json:
        # JSON has no infinity: an unknown gap, which is infinite, becomes null.
        plain = to_jsonable_python(facts, inf_nan_mode="null")
        typer.echo(json.dumps(plain, ensure_ascii=False, indent=2))
    elif html is None:
        _show(facts)


def _is_file(text: str) -> bool:
    """Return whether a text is the path of a file, or - for stdin."""
    with suppress(OSError, ValueError):  # as of a text that is longer than paths are
        return text == "-" or Path(text).is_file()
    return False


def _facts(ensemble: Ensemble, text: str, reports: Sequence[TokenReport | GroupReport]) -> dict[str, Any]:
    """Return the document of ``--json``: members, rule, gate, nats per token (over bytes, per byte) and all reports.

    Args:
        ensemble: the ensemble that predicted the text.
        text: the text; what is predicted of it has ``bytes`` bytes, and so many bits.
        reports: of each token of the text but the first; over bytes, of each group of bytes.
    """
    from softmeet.members.opaque import width_of

    tokens = [report.spelled(ensemble.tokenizer) for report in reports]
    every = zip(*(token["member_log_probs"] for token in tokens), strict=True)
    names = [options.short(name) for name in ensemble.names]
    config, over_bytes = ensemble.model.config, ensemble.model.over_bytes
    # Over tokens the first token is not predicted, so it has no report; over bytes all characters are predicted.
    first = "" if over_bytes else str(ensemble.tokenizer.decode([ensemble.tokenizer(text)["input_ids"][0]]))
    count = len(text.encode()) if over_bytes else len(tokens)
    nats = -sum(token["log_prob"] for token in tokens) / count
    gated = sum(token["gated"] for token in tokens) / len(tokens)
    trusts = [[rho] for rho in config.settings.member_trust] if config.settings.rule.uses_trust else []
    gate = ensemble.model.combiner.resolved(config.settings).gate
    facts = {
        "members": names, "files": [reader.name for reader in ensemble.model.claimants],
        "vocabulary": config.vocabulary, "rule": config.rule, "gate": None if gate is None else str(gate),
        "head_widths": [width_of(head) for head in ensemble.model.member_heads], "trust": trusts,
        "average_nats": -sum(token["pool_log_prob"] for token in tokens) / count,
        "claims": [fmean(own) for own in zip(*(token["claims"] for token in tokens), strict=True)],
        "bytes": len(text.removeprefix(first).encode()), "bits": nats * count / math.log(2),
        "member_bits": [-math.fsum(own) / math.log(2) for own in every],
    }  # fmt: skip
    ends = {"statuses": dict(Counter(t["status"] for t in tokens)), "fallbacks": sum(t["fallback"] for t in tokens)}
    return facts | ends | {"gated": gated, "first": first, "nats": nats, "tokens": tokens}


def _show(facts: dict[str, Any]) -> None:
    """Print the coloured text, and a table with a line for each token, on stdout."""
    from softmeet.hf.report import known_sum, shown, style

    console, line = out(), Text(harmless(facts["first"]))
    for token in facts["tokens"]:
        line.append(harmless(token["text"]), style=style(known_sum(token["disagreement"])))
    console.print(line)
    rows = [
        (
            shown(token["text"]), f"{math.exp(token['log_prob']):.2%}",
            *(f"{math.exp(x):.2%}" for x in token["member_log_probs"]), *(f"{x:.0%}" for x in token["claims"]),
            f"{'≤' * all(token['disagreement_is_bound'])}{sum(token['disagreement']):.3f}",
            _places(token) if facts["files"] else _moved(token),
        )
        for token in facts["tokens"]
    ]  # fmt: skip
    claims = [f"{name} claim" for name in facts["files"]]
    told = "stands in: file, line, length" if claims else "what moved: token, average → answer"
    columns = ("token", "ensemble", *facts["members"], *claims, "disagreement", told)
    last = len(columns) - 1
    print_table(console, columns, [rows], texts=(0, last), optional=last)
    unit = facts["vocabulary"][:-1]
    for sentence in endings(facts["statuses"], facts["fallbacks"], "token"):
        console.print(sentence)
    for name, share in zip(facts["files"], facts["claims"], strict=True):
        console.print(f"{name} claimed {share:.1%} of the answers, in the mean of the rows above")
    console.print(
        f"{_rule(facts)}: {facts['nats']:.3f} nats a {unit}, the average {facts['average_nats']:.3f}; disagreement in "
        "nats, summed over members"
        + (f"; gate {facts['gate']} closed at {facts['gated']:.1%} of the tokens" if facts["gate"] else "")
    )


def _moved(token: dict[str, Any]) -> str:
    """Return what the rule moved most at a token."""
    from softmeet.hf.report import shown

    return "  ".join(f"{shown(x)} {math.exp(old):.1%}→{math.exp(new):.1%}" for x, old, new in token["moved"][:2])


def _places(token: dict[str, Any]) -> str:
    """Return where the most of the last tokens stand in files."""
    found = filter(None, token["sources"])
    return "  ".join(f"{Path(one['path']).name}:{one['line']} ({one['end'] - one['start']})" for one in found)


def _rule(facts: dict[str, Any]) -> str:
    """Return the rule's text, with its trusts if it has them: ``meet, trust 0.3``."""
    trusts = dict.fromkeys("/".join(f"{rho:g}" for rho in own) for own in facts["trust"])
    return str(facts["rule"]) + (f", trust {' '.join(trusts)}" if trusts and "trust" not in facts["rule"] else "")


def _bits(facts: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield for the ensemble and each member its name, the text's bits, and those of each of its bytes."""
    for name, bits in zip(("all as one", *facts["members"]), (facts["bits"], *facts["member_bits"]), strict=True):
        yield name, bits, bits / max(facts["bytes"], 1)


def _page(facts: dict[str, Any]) -> str:
    """Return a page with the look inside the text, as the server's page shares it: data, and a script that shows it."""
    record = {
        "title": f"softmeet: {facts['rule']}", "members": facts["members"], "files": facts["files"],
        "rule": _rule(facts), "notes": endings(facts["statuses"], facts["fallbacks"]), "figures": list(_bits(facts)),
        "turns": [{"role": "text", "text": facts["first"], "tokens": facts["tokens"]}],
    }  # fmt: skip
    told = json.dumps(to_jsonable_python(record, inf_nan_mode="null"), ensure_ascii=False).replace("<", "\\u003c")
    page = files("softmeet.server").joinpath("page")
    parts = {
        "nonce": secrets.token_hex(16), "title": escape(record["title"]), "record": told,
        "style": page.joinpath("page.css").read_text(encoding="utf-8"),
        "script": re.sub("^export ", "", page.joinpath("look.js").read_text(encoding="utf-8"), flags=re.MULTILINE),
    }  # fmt: skip
    whole = page.joinpath("shared.html").read_text(encoding="utf-8")
    return re.sub("{(nonce|title|style|record|script)}", lambda found: parts[found[1]], whole)
