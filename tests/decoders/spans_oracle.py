"""Text by spans of words (AdaFuse) in plain Python: slow, and independent of softmeet.

Members are those of ``rival_oracles``. All that a member can write are its ordinary ids, and the end, whose probability
is the sum of those of its ids that end a text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rival_oracles import Members, State, TinyMember

MOST_TOKENS_OF_A_WORD = 12
# What a member writes: some bytes, and whether the text ends behind them.
Span = tuple[bytes, bool]


def following(member: TinyMember, state: State) -> dict[int | None, float]:
    """Give the probability of each ordinary id, and of the end, None, last."""
    p = member.probs(state)
    found: dict[int | None, float] = {token: float(p[token]) for token in sorted(member.tokens)}
    return found | {None: sum(float(p[token]) for token in sorted(member.end_ids))}


def span_of(written: Sequence[bytes | None], margins: Sequence[float], margin: float, words: int) -> Span | None:
    """Say which span a member proposes that has written some tokens, None for an end; None if it has to write more.

    A word is whitespace, if there is any, and then what is none up to the next whitespace, or up to the end of the
    text, which is then a part of the span. A word that is not over after 12 tokens ends there, and the span with it.
    Behind a word the member goes on if its margin was at least ``margin`` where the word began: at the token that has
    the word's first byte.
    """
    text, ended = b"".join(token or b"" for token in written), written[-1] is None
    owner = [k for k, token in enumerate(written) for _ in token or b""]
    at = 0
    for number in range(1, words + 1):
        first = owner[at] if at < len(text) else len(written)
        stop = re.compile(rb"\s*\S*").match(text, at).end()
        if stop == len(text):
            if ended:
                return text, True
            return (text, False) if len(written) - first >= MOST_TOKENS_OF_A_WORD else None
        at = stop
        if number == words or margins[first] < margin:
            return text[:at], False
    raise AssertionError


def proposal(member: TinyMember, state: State, margin: float, words: int) -> Span:
    """Write greedily until the member has its span; of equals the smallest id comes first, and the end last."""
    written: list[bytes | None] = []
    margins: list[float] = []
    while True:
        p = following(member, state)
        best = max(p, key=lambda token: p[token])
        margins.append(p[best] - max([x for token, x in p.items() if token != best], default=0.0))
        written.append(None if best is None else member.tokens[best])
        span = span_of(written, margins, margin, words)
        if span is not None:
            return span
        state = (*state, best)


def losses(member: TinyMember, state: State, tokens: Sequence[int], ended: bool) -> list[float]:
    """Give the negative log-probability in nats of each of some tokens, and of the end behind them if they end."""
    found = []
    for token in [*tokens, None] if ended else tokens:
        p = following(member, state)[token]
        found.append(-math.log(p) if p > 0 else math.inf)
        state = state if token is None else (*state, token)
    return found


def spans_search(
    members: Members, prompts: Sequence[State], w: Sequence[float], most: int, margin: float = 0.7, words: int = 3
) -> tuple[bytes, bool, list[float]]:
    """Write a text by spans; give its bytes, whether it ended, and each member's log-probability of it.

    In each round every member proposes a span. A span that has more tokens of the first member than are left of
    ``most``, its end counted, is cut to those that are left, and then does not end. The span of the least loss is
    taken, of equals that of the first member: the mean over its tokens of the negative log-probability, averaged over
    the members of positive weight; each reads it as the tokens into which it cuts it. One of which the first member has
    no token counts as one.
    """
    states, text, count, totals = list(prompts), b"", 0, [0.0] * len(members)
    while count < most:
        found = []
        for proposer, own in zip(members, states, strict=True):
            span, ended = proposal(proposer, own, margin, words)
            first = members[0].encode(span)
            if len(first) + ended > most - count:
                first, ended = first[: most - count], False
                span = b"".join(members[0].tokens[token] for token in first)
            cuts = [first, *(member.encode(span) for member in members[1:])]
            nats = [losses(*told, ended) for told in zip(members, states, cuts, strict=True)]
            means = [sum(one) / max(1, len(one)) for one in nats]
            loss = sum(weight * mean for weight, mean in zip(w, means, strict=True) if weight > 0)
            found.append((loss, span, ended, cuts, nats))
        _, span, ended, cuts, nats = min(found, key=lambda one: one[0])
        states = [(*state, *cut) for state, cut in zip(states, cuts, strict=True)]
        totals = [total - sum(one) for total, one in zip(totals, nats, strict=True)]
        text, count = text + span, count + max(1, len(cuts[0]) + ended)
        if ended:
            return text, True, totals
    return text, False, totals
