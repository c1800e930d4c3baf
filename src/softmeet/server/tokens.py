"""From the hidden states of sequences of one combination to the tokens that are drawn, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.engine.ask import Hidden
from softmeet.engine.combine import Combined
from softmeet.engine.draw import Place, choose
from softmeet.engine.processors import following
from softmeet.errors import SoftmeetError
from softmeet.hf.report import token_report
from softmeet.readers.byte_alphabet import shown_byte
from softmeet.rules.problem import TokensBefore
from softmeet.server.sequences import Sequence, Token
from softmeet.server.tasks import Task
from softmeet.solvers.base import Status

# Tokens of a prompt that are scored at once: their solver's steps cannot be interrupted.
_SCORED_AT_ONCE = 16


def drawn(sequences: list[Sequence], ours: Float[Tensor, "B v"]) -> list[int]:
    """Draw what follows each sequence's tokens and drafts, from log-probabilities in nats, as its request asks.

    The sequences are of one combination.

    Where a sequence cannot go on, its ``dead_end`` is set.
    """
    scores, noise, texts = list[Tensor](), list[Place | None](), [s.tokens + s.drafts for s in sequences]
    for allowed in following(sequences[0].combination.alphabet):
        ours = allowed.behind(texts, ours)
    for s, text, row in zip(sequences, texts, ours.split(1), strict=True):
        try:
            scores.append(s.draw.behind(text, row))
        except SoftmeetError as error:
            s.dead_end = error
            scores.append(row)
        noise += s.draw.noise(len(text))
    return choose(torch.cat(scores), noise).tolist()


def scored(s: Sequence, hidden: Hidden, task: Task, seconds: float) -> list[Token]:
    """Return the tokens of a prompt but the first, with what its request asks for.

    Args:
        s: the prompt's sequence.
        hidden: each member's last hidden states at all tokens of the prompt but the last, (t, d_i).
        task: the caller, which may pause.
        seconds: those that the rule may work in all.
    """
    how, tokens, found = s.combination, iter(s.prompt[1:]), list[Token]()
    before = TokensBefore.of(torch.tensor(s.prompt[:-1]), how.model.tokenizer)
    with task.limit(seconds):
        for start in range(0, len(hidden[0]), _SCORED_AT_ONCE):
            rows = slice(start, min(start + _SCORED_AT_ONCE, len(hidden[0])))
            some, known = s.asked and s.asked.take(rows), before and before.take(rows)
            log_probs, solution = how.model.combiner.solve_rows(
                [states[rows] for states in hidden], how.settings, some, known, proved=False
            )
            count, chunk = log_probs.shape[1], Combined(solution.log_probs, log_probs, solution)
            found += tokens_of([s] * count, chunk, islice(tokens, count), scored=True)
            task.pause()
    return found


def tokens_of(
    sequences: list[Sequence],
    found: Combined,
    tokens: Iterable[int],
    saved: float = 0.0,
    *,
    start: int = 0,
    scored: bool = False,
) -> Iterator[Token]:
    """Yield each row's token, with the log-probabilities, the listed tokens and the report that its request asks for.

    Args:
        sequences: the sequence of each of the rows.
        found: what the rule makes of them, and perhaps of others.
        tokens: for each row, the id that was drawn, or that stands in the prompt.
        saved: seconds that a closed gate saves in a row; ignored where the row's gate was open.
        start: the first of the rows.
        scored: whether rows are places of a prompt, which members have read to its end.
    """
    # All rows at once: each read waits for the device.
    solution, count = found.solution, len(found.ours)
    status = [Status.OPTIMAL.value] * count if solution is None else solution.status.tolist()
    closed = [False] * count if solution is None else solution.gated.tolist()
    for row, (s, token) in enumerate(zip(sequences, tokens, strict=True), start):
        gated, asked = closed[row], s.request
        made = Token(token, status=Status(status[row]).name, gated=gated, saved=saved if gated else 0.0)
        if asked.top is not None or asked.report is not None:
            ours = found.ours[row]
            best = ours.topk(min(asked.top or 0, len(ours)))
            listed = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            # Only scored prompts show ranks, which take a pass over the vocabulary.
            rank = 1 + int((ours > ours[token]).sum().item()) if scored else None
            made = replace(made, log_prob=ours[token].item(), top=listed, rank=rank)
        if asked.sources:
            made = replace(made, claims=found.claims(row))
        if asked.report is not None:
            made = replace(made, report=_report(s, found, row, token, scored=scored))
        yield made


def _report(s: Sequence, found: Combined, row: int, token: int, *, scored: bool) -> dict[str, Any]:
    """Return the report on a row's token, with its texts.

    Where symbols are no tokens, ``member_top`` lists what members' own tokens could come there, as readers explain, or
    if that is not known any more the most probable symbols.
    """
    assert s.request.report is not None
    members, solution = found.solved
    report = token_report(solution, members, row, token, s.request.report)
    if s.combination.symbols_are_tokens:
        return report.spelled(s.request.tokenizer)
    expected = [] if scored else s.expected(s.request.report)
    return report.with_texts(shown_byte) | ({"member_top": [list(own) for own in expected]} if expected else {})
