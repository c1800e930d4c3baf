"""The page's own pieces of HTML: a text of coloured tokens, and the bars behind one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import Any

from softmeet.hf.report import heat, known_sum, shown

Report = dict[str, Any]


def text_of(tokens: Sequence[Report], prompt: str, rule: str, *, done: bool, links: bool = False) -> str:
    """A text as it streams: every token can be chosen by pointer or keyboard, and is the warmer the more it took.

    With ``links``, for a page without a script, token k leads to ``#tk``.
    """
    spans = "".join(_span(k, token, links=links) for k, token in enumerate(tokens))
    cursor = "" if done else '<span class="cursor" aria-hidden="true"></span>'
    return (
        f'<h3>{escape(rule)}</h3><div class="text"><span class="prompt">{escape(prompt)}</span>{spans}{cursor}</div>'
        f'<p class="sum">{summary(tokens)}</p>'
    )


def _span(k: int, token: Report, *, links: bool) -> str:
    nats = known_sum(token["disagreement"])
    label = f"{shown(token['text'])}, disagreement {nats:.3f} nats, {math.exp(token['log_prob']):.1%}"
    hot = heat(token["disagreement"])
    text = escape(token["text"]).replace("\n", '<span class="nl">⏎</span>\n')
    tag, how = ("a", f'href="#t{k}"') if links else ("span", f'role="button" tabindex="{-1 if k else 0}" data-k="{k}"')
    label = f'title="{escape(label)}" aria-label="{escape(label)}"'
    return f'<{tag} class="tok" {how} style="--heat:{hot:.3f}" {label}>{text}</{tag}>'


def summary(tokens: Sequence[Report]) -> str:
    """The figures of a text in a line."""
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
    """What every member and the ensemble expected at a token, what moved, and who pushed."""
    scale = math.exp(max(x for rows in [token["top"], *token["member_top"]] for _, x in rows))
    cards = [_card("ensemble", token["top"], token["text"], token["log_prob"], "", scale, "ours")]
    for name, rows, own, nats, bound in zip(
        members, token["member_top"], token["member_log_probs"], token["disagreement"], token["disagreement_is_bound"],
        strict=True,
    ):  # fmt: skip
        note = (
            f"corrected by {'at most ' if bound else ''}{nats:.4f} nats" if rows else "not asked: the gate was closed"
        )
        cards.append(_card(name, rows, token["text"], own, note, scale, ""))
    sure = f"within {token['gap']:.1e} nats of the optimum" + (", certified" if token["gap_is_certified"] else "")
    sure = ("gate closed, " if token.get("gated") else "") + (sure if math.isfinite(token["gap"]) else "not solved")
    figures = f"{token['status'].lower().replace('_', ' ')}, {sure}, {token['num_passes']:.1f} head passes"
    return (
        f"<h3><code>{escape(shown(token['text']))}</code> <small>by {escape(rule)}: {escape(figures)}</small></h3>"
        f'<div class="cards">{"".join(cards)}</div>{_moves(token, members)}'
    )


def _card(name: str, rows: Sequence[Sequence[Any]], chosen: str, own: float, note: str, scale: float, kind: str) -> str:
    bars = "".join(
        f'<li class="{"came" if text == chosen else ""}"><code>{escape(shown(text))}</code>'
        f'<i style="--w:{100 * math.exp(x) / scale:.1f}%"></i><b data-log-prob="{x!r}">{math.exp(x):.1%}</b></li>'
        for text, x in rows
    )
    came = f"the token that came: <b>{math.exp(own):.2%}</b>" if rows else ""
    return f'<section class="card {kind}"><h4>{escape(name)}</h4><ol>{bars}</ol><p>{came}<br>{note}</p></section>'


def _moves(token: Report, members: Sequence[str]) -> str:
    if all(before == after for _, before, after in token["moved"]):
        return f"<p>Nothing moved: {_CLOSED if token.get('gated') else _POOL}.</p>"
    # A rule that tilts no pool has nobody who pushed.
    pushed = any(any(pushes) for pushes in token["pushes"])
    heads = "".join(f"<th>{escape(name)}</th>" for name in members) if pushed else ""
    rows = "".join(
        f"<tr><th><code>{escape(shown(text))}</code></th><td>{math.exp(before):.2%} → {math.exp(after):.2%}</td>"
        f"{_nats(after - before)}{''.join(map(_nats, pushes)) if pushed else ''}</tr>"
        for (text, before, after), pushes in zip(token["moved"], token["pushes"], strict=True)
    )
    title = "What moved, from the pool to the answer" + (", and who pushed (nats)" if pushed else " (nats)")
    return (
        f'<h4>{title}</h4><div class="scroll"><table><thead><tr><th>token</th><th>probability</th><th>change</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>{_WHY if pushed else ''}"
    )


_POOL = "the answer is the pool, the members' average"
_CLOSED = "the gate was closed, so the rule was not solved"
_WHY = (
    "<p>A member pushes the answer towards its own opinion, along what its softmax head can express, and is itself "
    "corrected the other way, at the price of its trust. Pushes are against the average token; with a constant that "
    "makes probabilities sum to one they add up to the change.</p>"
)


def _nats(x: float) -> str:
    if not math.isfinite(x):
        return "<td>–</td>"
    side = "up" if x > 0 else "down"
    return f'<td class="push {side}" style="--s:{min(abs(x), 1):.2f}">{x:+.3f}</td>'


def alert(message: str) -> str:
    """What went wrong, said aloud by screen readers too."""
    return f'<p class="alert" role="alert">{escape(message)}</p>' if message else ""


LEGEND = (
    '<p class="legend"><span>members agree</span><i aria-hidden="true"></i><span>corrected by ½ nat or more</span></p>'
)
