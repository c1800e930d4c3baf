"""The page's own pieces of HTML: a text of coloured tokens, and the bars behind one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import Any

from softmeet.hf.report import heat, shown

Report = dict[str, Any]


def text_of(tokens: Sequence[Report], prompt: str, rule: str, *, done: bool) -> str:
    """A text as it streams: every token can be chosen by pointer or keyboard, and is the warmer the more it took."""
    spans = "".join(_span(k, token) for k, token in enumerate(tokens))
    cursor = "" if done else '<span class="cursor" aria-hidden="true"></span>'
    return (
        f'<h3>{escape(rule)}</h3><div class="text"><span class="prompt">{escape(prompt)}</span>{spans}{cursor}</div>'
        f'<p class="sum">{summary(tokens)}</p>'
    )


def _span(k: int, token: Report) -> str:
    nats = sum(token["disagreement"])
    label = f"{shown(token['text'])}, disagreement {nats:.3f} nats, {math.exp(token['log_prob']):.1%}"
    text = escape(token["text"]).replace("\n", '<span class="nl">⏎</span>\n')
    return (
        f'<span class="tok" role="button" tabindex="{-1 if k else 0}" data-k="{k}" style="--heat:{heat(token["disagreement"]):.3f}" '
        f'title="{escape(label)}" aria-label="{escape(label)}">{text}</span>'
    )


def summary(tokens: Sequence[Report]) -> str:
    """The figures of a text in a line."""
    if not tokens:
        return "…"
    disagreement = fmean(sum(t["disagreement"]) for t in tokens)
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
        note = f"corrected by {'at most ' if bound else ''}{nats:.4f} nats"
        cards.append(_card(name, rows, token["text"], own, note, scale, ""))
    sure = f"within {token['gap']:.1e} nats of the optimum" + (", certified" if token["gap_is_certified"] else "")
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
    came = f"the token that came: <b>{math.exp(own):.2%}</b>"
    return f'<section class="card {kind}"><h4>{escape(name)}</h4><ol>{bars}</ol><p>{came}<br>{note}</p></section>'


def _moves(token: Report, members: Sequence[str]) -> str:
    if all(before == after for _, before, after in token["moved"]):
        return "<p>Nothing moved: the answer is the pool, the members' average.</p>"
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

# Arrow keys walk along the tokens; Enter, space or a click chooses one.
CHOOSE = """
const choose = (token) => {
  element.querySelectorAll('.tok.on').forEach((t) => t.classList.remove('on'));
  token.classList.add('on');
  trigger('click', {k: Number(token.dataset.k)});
};
element.addEventListener('click', (event) => {
  const token = event.target.closest('.tok');
  if (token) choose(token);
});
element.addEventListener('keydown', (event) => {
  const token = event.target.closest('.tok');
  if (!token) return;
  const tokens = [...element.querySelectorAll('.tok')];
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (step) {
    const next = tokens[tokens.indexOf(token) + step];
    if (next) { token.tabIndex = -1; next.tabIndex = 0; next.focus(); }
    event.preventDefault();
  } else if (event.key === 'Enter' || event.key === ' ') {
    choose(token);
    event.preventDefault();
  }
});
"""

STYLE = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
.head h1 { font-size: 1.7rem; margin: .2rem 0; letter-spacing: -.01em; } .head p { color: var(--body-text-color-subdued); margin: 0; }
.panel .panel { border: 0; padding: 0; } .panel { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 1rem 1.2rem; background: var(--background-fill-primary); }
.panel h3 { margin: 0 0 .5rem; font-size: 1rem; } .panel h3 small { font-weight: 400; color: var(--body-text-color-subdued); }
.panel h4 { margin: .9rem 0 .4rem; font-size: .9rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 1.05rem/1.95 ui-serif, Georgia, serif; min-height: 6rem; }
.prompt { color: var(--body-text-color-subdued); }
.tok { cursor: pointer; border-radius: 4px; padding: .12em 0; background: rgb(226 88 34 / calc(var(--heat) * .62)); transition: box-shadow .1s; }
.tok:hover { box-shadow: 0 0 0 1.5px #e25822; } .tok:focus-visible { outline: 2.5px solid #1f5fbf; outline-offset: 1px; }
.tok.on { box-shadow: 0 0 0 2px #1f5fbf; } .nl { opacity: .35; }
.cursor { display: inline-block; width: .5em; height: 1.1em; vertical-align: -.18em; background: #e25822; animation: blink 1s steps(2) infinite; }
@keyframes blink { to { opacity: 0; } } @media (prefers-reduced-motion: reduce) { .cursor { animation: none; } }
.sum { color: var(--body-text-color-subdued); font-size: .82rem; margin: .6rem 0 0; }
.legend { display: flex; gap: .6rem; align-items: center; font-size: .8rem; color: var(--body-text-color-subdued); margin: 0; }
.legend i { width: 9rem; max-width: 30vw; height: .7rem; border-radius: 4px; background: linear-gradient(90deg, rgb(226 88 34 / 0), rgb(226 88 34 / .62)); border: 1px solid var(--border-color-primary); }
.alert { background: #fdecea; color: #8c1d13; border: 1px solid #f3b4ad; border-radius: 8px; padding: .6rem .9rem; margin: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 195px), 1fr)); gap: .8rem; }
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .7rem .8rem; } .card.ours { border-color: #1f5fbf; }
.card h4 { margin: 0 0 .4rem; } .card ol { list-style: none; margin: 0; padding: 0; } .card p { font-size: .8rem; color: var(--body-text-color-subdued); margin: .5rem 0 0; }
.card li { display: grid; grid-template-columns: 5rem 1fr 3.1rem; gap: .4rem; align-items: center; font-size: .82rem; line-height: 1.55; }
.card li code { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; background: none; padding: 0; color: inherit; }
.card li i { height: .72rem; width: max(var(--w), 1px); border-radius: 3px; background: #9db4d6; } .card.ours li i { background: #1f5fbf; }
.card li.came i { background: #e25822; } .card li.came { font-weight: 600; } .card li b { font-weight: inherit; text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; width: 0; min-width: 100%; } .panel table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
.panel td, .panel th { padding: .22rem .8rem .22rem 0 !important; text-align: right; white-space: nowrap; border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; } .panel th:first-child { text-align: left; }
.panel table, .panel tr, .panel thead, .panel tbody { border: 0 !important; } .push.up { color: #14713d; } .push.down { color: #a8321a; } .dark .push.up { color: #5fd08f; } .dark .push.down { color: #ff9b80; }
.panel p { font-size: .86rem; color: var(--body-text-color-subdued); max-width: 60rem; }
@media (max-width: 600px) { .panel { padding: .8rem; } .gradio-container { padding: .5rem !important; } }
"""
