"""The page's own pieces of HTML: a text of coloured tokens, and the bars behind one of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from statistics import fmean
from typing import Any

from jinja2 import Environment

from softmeet.hf.report import heat, known_sum, shown

# What softmeet.hf.report.TokenReport.spelled gives.
Report = dict[str, Any]

LEGEND = (
    '<p class="legend"><span>members agree</span><i aria-hidden="true"></i><span>corrected by ½ nat or more</span></p>'
)


def resource(name: str) -> str:
    """Return the text of a file that comes with the page."""
    return files("softmeet.server").joinpath(name).read_text(encoding="utf-8")


def _macros() -> Any:
    """Compile the templates, which are laid out for people: newlines and indents are none of the page's."""
    found = Environment(autoescape=False)  # noqa: S701 - whatever is not ours is escaped by name, as ever
    found.filters |= {"e": escape, "exp": math.exp, "finite": math.isfinite}
    found.filters |= {"heat": heat, "known_sum": known_sum, "shown": shown}
    found.filters["percent"] = lambda log_prob, digits: f"{math.exp(log_prob):.{digits}%}"
    return found.from_string(re.sub(r"\n *", "", resource("tokens.html"))).module


_MACROS = _macros()


def text_of(tokens: Sequence[Report], prompt: str, rule: str, *, done: bool, links: bool = False) -> str:
    """Return a text as HTML: every token can be chosen by pointer or keyboard, and is the warmer the more it took.

    Args:
        tokens: so far.
        prompt, rule: what the text continues, and by which rule.
        done: whether the text has ended; else it ends with a cursor.
        links: for a page without a script, token k leads to ``#tk``.
    """
    return str(_MACROS.text(tokens, prompt, rule, summary(tokens), done, links))


def summary(tokens: Sequence[Report]) -> str:
    """Return the figures of a text in a line: means over its tokens."""
    if not tokens:
        return "…"
    disagreement = fmean(known_sum(t["disagreement"]) for t in tokens)
    bound = "at most " if all(all(t["disagreement_is_bound"]) for t in tokens) else ""
    passes, nats = fmean(t["num_passes"] for t in tokens), -fmean(t["log_prob"] for t in tokens)
    return (
        f"{len(tokens)} tokens · disagreement {bound}{disagreement:.3f} nats a token · {nats:.2f} nats a token · "
        f"{passes:.1f} head passes a token"
    )


def details_of(token: Report, members: Sequence[str], rule: str) -> str:
    """Return as HTML what every member and the ensemble expected at a token, what moved, and who pushed."""
    scale = math.exp(max(x for rows in [token["top"], *token["member_top"]] for _, x in rows))
    cards = [("ours", "ensemble", token["top"], token["log_prob"], "")]
    for name, rows, own, nats, bound in zip(
        members, token["member_top"], token["member_log_probs"], token["disagreement"], token["disagreement_is_bound"],
        strict=True,
    ):  # fmt: skip
        corrected = f"corrected by {'at most ' if bound else ''}{nats:.4f} nats"
        cards.append(("", name, rows, own, corrected if rows else "not asked: the gate was closed"))
    sure = f"within {token['gap']:.1e} nats of the optimum" + (", certified" if token["gap_is_certified"] else "")
    sure = ("gate closed, " if token.get("gated") else "") + (sure if math.isfinite(token["gap"]) else "not solved")
    figures = f"{token['status'].lower().replace('_', ' ')}, {sure}, {token['num_passes']:.1f} head passes"
    moved = any(before != after for _, before, after in token["moved"])
    moves = list(zip(token["moved"], token["pushes"], strict=True)) if moved else []
    # A rule that tilts no pool has nobody who pushed.
    pushing = members if any(any(pushes) for pushes in token["pushes"]) else []
    return str(_MACROS.details(token, rule, figures, cards, scale, moves, pushing))


def alert(message: str) -> str:
    """Return what went wrong as HTML that screen readers say aloud too; nothing for no message."""
    return f'<p class="alert" role="alert">{escape(message)}</p>' if message else ""
