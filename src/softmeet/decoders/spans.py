"""Spans: each member proposes some words, and the one that all members together find the likeliest is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from softmeet.decoders.base import Decoding, ToWrite, WeightedText
from softmeet.decoders.own_tokens import OwnTexts, OwnTokensDecoder

# Where the end of a text stands among what a member predicts.
_END = -1
# The most tokens of a word.
MOST_TOKENS = 12
# Whitespace, if there is any, and what is none, up to the next whitespace.
_WORD = re.compile(rb"\s*\S*")


@dataclass
class Span:
    """Words as one member writes them, token by token.

    Args:
        margin: the least margin at which the member goes on to a next word.
        words: the most words.

    Attributes:
        text: their bytes; once they are complete, without what was written behind the last word.
        ended: whether the text ends behind them.
        complete: whether nothing follows.

    Example:
        >>> span = Span(margin=0.5, words=2)
        >>> for word, margin in ((b" the", 0.9), (b" kin", 0.4), (b"g", 0.9), (b" said", 0.9)):
        ...     span.add(word, margin)
        >>> span.text, span.complete
        (b' the king', True)
    """

    margin: float
    words: int
    text: bytes = b""
    ended: bool = False
    complete: bool = False
    _tokens: int = 0
    # Where the word begins that is being written.
    _start: int = 0
    # Of which token each byte is, and that token's margin.
    _of: list[tuple[int, float]] = field(default_factory=list)

    def add(self, word: bytes | None, margin: float) -> None:
        """Add a token.

        Args:
            word: what it spells; None for the end of the text.
            margin: by how much it was more probable than any other token.
        """
        self._of += [(self._tokens, margin)] * len(word or b"")
        self.text, self.ended, self._tokens = self.text + (word or b""), word is None, self._tokens + 1
        while not self.complete and (end := self._word_end()) < len(self.text):
            _, own = self._of[self._start]
            self._start, self.words = end, self.words - 1
            if not self.words or own < self.margin:
                self.text, self.ended, self.complete = self.text[:end], False, True
        self.complete |= self.ended or self._tokens - self._first() >= MOST_TOKENS

    def _word_end(self) -> int:
        found = _WORD.match(self.text, self._start)
        assert found is not None, "it matches any bytes"
        return found.end()

    def _first(self) -> int:
        """Return the number of the token with which the word begins that is written."""
        return self._of[self._start][0] if self._start < len(self._of) else self._tokens


class Spans(OwnTokensDecoder):
    """Write a text by spans of words: in each round every member proposes one, and the best of these is written.

    A member writes its likeliest tokens, one after another. A word is whitespace (of ASCII), if there is any, and then
    other bytes up to the next whitespace, whatever the tokens are. Behind a word, the member goes on to a next one if
    it was certain where the word began: if the largest probability was at least ``margin`` above the second largest at
    the token that has the word's first byte. No span has more than ``words`` words. A word that is not over after 12
    tokens ends there, and the span with it. Where the end of the text comes in place of the whitespace behind a word,
    or first of all, the span ends the text; its probability is the sum over all tokens that end a text.

    Then each member cuts each span into tokens as its own tokenizer does, but for bytes of which it has none, and takes
    the mean of -log p over these, the end counted. The span is written whose mean is the least, averaged over members
    by weight; of equals that of the first member that proposes one. A member of weight 0 proposes, too. All members
    read the span as they cut it. Spaces are bytes like any others: none is added, taken away or changed.

    The limit counts tokens of the first member, the end too; a span for which there is too little room is cut before it
    is judged. Tokens that spell nothing and end nothing, as those of chats, are left out. From Cui et al. (AdaFuse,
    arXiv:2601.06022), whose code strips spans and joins them by one space.
    """

    margin: float = Field(default=0.7, ge=0, le=1)
    """The least margin of the largest probability, where a word begins, at which a member goes on behind the word."""
    words: int = Field(default=3, ge=1, le=64)
    """The most words of a span."""

    name = "spans"
    summary = "words that members propose, and of which the likeliest are written (AdaFuse)"
    reference = "https://arxiv.org/abs/2601.06022"

    def rows(self, members: int) -> int:
        """Return one for the text, and one for each member's span."""
        return 1 + members

    @property
    def ahead(self) -> int:
        """The most tokens of a span."""
        return MOST_TOKENS * self.words

    def decode(self, texts: Sequence[OwnTexts], job: ToWrite) -> list[Decoding]:
        """Write behind each of B prompts, and read the newest tokens of all of them together."""
        members = [_Member(own) for own in texts]
        weights: Any = job.settings.weights
        every = [_Written(k * self.rows(len(texts)), [0.0] * len(texts)) for k in range(job.prompts)]
        while live := [one for one in every if not one.ended and one.count < job.most]:
            for member in members:
                member.read(live)
            spans = [member.propose(live, self) for member in members]
            for one, own in zip(live, zip(*spans, strict=True), strict=True):
                one.take(own, members[0], job.most)
            told = [member.judge(live, first=not i) for i, member in enumerate(members)]
            for k, one in enumerate(live):
                chosen = one.choose([own[k] for own in told], weights)
                for member in members:
                    member.go_on(one, chosen)
        return [one.found(weights, texts[0]) for one in every]


@dataclass(frozen=True)
class _Proposal:
    """A span: its bytes, whether it ends the text, and the first member's tokens for it."""

    text: bytes
    ended: bool
    tokens: tuple[int, ...]


class _Written:
    """What is written behind one prompt.

    Args:
        row: the row in which all members read it; the rows behind it are for spans.
        log_probs: for each member its log-probability of the text.

    Attributes:
        proposals: the spans among which one is to be chosen, each once.
        count: how many tokens of the first member it has.
        ended: whether it has ended.
    """

    def __init__(self, row: int, log_probs: list[float]) -> None:
        self.row, self.log_probs = row, log_probs
        self.proposals = list[_Proposal]()
        self.count, self.ended = 0, False
        self._text, self._tokens = b"", list[int]()

    def take(self, spans: Sequence[Span], first: _Member, most: int) -> None:
        """Take the spans that members propose, each cut to the room that is left for tokens of the first member."""
        found = dict[tuple[bytes, bool], _Proposal]()
        for span in spans:
            tokens, text, ended = first.tokens.cut(span.text), span.text, span.ended
            if len(tokens) + ended > most - self.count:
                tokens, ended = tokens[: most - self.count], False
                text = first.tokens.spelled(tokens)
            found.setdefault((text, ended), _Proposal(text, ended, tuple(tokens)))
        self.proposals = list(found.values())

    def choose(self, told: Sequence[Sequence[list[float]]], weights: Sequence[float]) -> int:
        """Write the best span, and return its number.

        Args:
            told: for each member, for each span, the log-probabilities of its tokens.
            weights: of each member.
        """
        losses = [
            sum(-w * sum(own) / max(1, len(own)) for w, own in zip(weights, by_member, strict=True) if w)
            for by_member in zip(*told, strict=True)
        ]
        number = min(range(len(losses)), key=losses.__getitem__)
        span = self.proposals[number]
        self._text, self.ended = self._text + span.text, span.ended
        self._tokens += span.tokens
        # Bytes for which the first member has no tokens count, too, so that every round comes nearer to the limit.
        self.count += max(1, len(span.tokens) + span.ended)
        self.log_probs = [before + sum(own[number]) for before, own in zip(self.log_probs, told, strict=True)]
        return number

    def found(self, weights: Sequence[float], first: OwnTexts) -> Decoding:
        """Return the text that was written, with its log-probability by each member."""
        score = sum(w * own for w, own in zip(weights, self.log_probs, strict=True) if w)
        symbols = (*self._tokens, *first.tokens.ends[:1]) if self.ended else tuple(self._tokens)
        text = self._text.decode(errors="replace")
        return Decoding((WeightedText(symbols, self.ended, score, tuple(self.log_probs), text),), 0)


class _Member:
    """A member: what it predicts of its ordinary tokens, by id, and of the end of a text, last.

    Args:
        own: its texts.

    Attributes:
        tokens: its tokens.
    """

    def __init__(self, own: OwnTexts) -> None:
        self.tokens, self._texts, self._ends = own.tokens, own.texts, list(own.tokens.ends)
        self._behind = dict[_Written, Float[Tensor, " u"]]()

    def _predict(self, rows: Sequence[int]) -> Float[Tensor, "k u"]:
        told = self._texts.log_probs(rows)[0]
        found = torch.full((len(told), told.shape[-1] + 1), -torch.inf, dtype=told.dtype)
        ordinary = torch.from_numpy(self.tokens.ids)
        found[:, ordinary] = told[:, ordinary]
        if self._ends:
            found[:, _END] = told[:, self._ends].logsumexp(-1)
        return found

    def read(self, texts: Sequence[_Written]) -> None:
        """Read the newest tokens of texts."""
        self._behind = dict(zip(texts, self._predict([one.row for one in texts]), strict=True))

    def propose(self, texts: Sequence[_Written], options: Spans) -> list[Span]:
        """Write a span behind each of some texts, which were read."""
        rows = [one.row + 1 for one in texts]
        self._texts.replace(rows, [one.row for one in texts])
        spans = [Span(options.margin, options.words) for _ in texts]
        live, told = list(range(len(texts))), torch.stack([self._behind[one] for one in texts])
        while True:
            best, margins = _likeliest(told)
            for k, token, margin in zip(live, best, margins, strict=True):
                spans[k].add(self.tokens.spelling.get(token), margin)
            going = [(k, token) for k, token in zip(live, best, strict=True) if not spans[k].complete]
            if not going:
                return spans
            live = [k for k, _ in going]
            self._texts.add([rows[k] for k in live], [token for _, token in going])
            told = self._predict([rows[k] for k in live])

    def judge(self, texts: Sequence[_Written], *, first: bool) -> list[list[list[float]]]:
        """Read all spans behind some texts, which were read, and return the log-probabilities of their tokens.

        Args:
            texts: the texts.
            first: whether this is the first member, whose tokens for the spans are known.
        """
        pairs = [(one, k) for one in texts for k in range(len(one.proposals))]
        rows = [one.row + 1 + k for one, k in pairs]
        spans = [one.proposals[k] for one, k in pairs]
        tokens = [
            [*(span.tokens if first else self.tokens.cut(span.text)), *([_END] if span.ended else [])] for span in spans
        ]
        self._texts.replace(rows, [one.row for one, _ in pairs])
        found = [list[float]() for _ in pairs]
        for step in range(max(map(len, tokens))):
            live = [k for k, own in enumerate(tokens) if step < len(own)]
            told = self._predict([rows[k] for k in live]) if step else [self._behind[pairs[k][0]] for k in live]
            for k, log_probs in zip(live, told, strict=True):
                found[k].append(float(log_probs[tokens[k][step]]))
            added = [k for k in live if tokens[k][step] != _END]
            self._texts.add([rows[k] for k in added], [tokens[k][step] for k in added])
        by_text = iter(found)
        return [[next(by_text) for _ in one.proposals] for one in texts]

    def go_on(self, text: _Written, number: int) -> None:
        """Have a text be what it is with one of the spans, which were read."""
        if text.ended:
            self._texts.finish(range(text.row, text.row + 1 + len(text.proposals)))
        else:
            self._texts.replace([text.row], [text.row + 1 + number])


def _likeliest(told: Float[Tensor, "k u"]) -> tuple[list[int], list[float]]:
    """Return of each row where it is the largest, of equals the first, and by how much its probability is ahead.

    Example:
        >>> _likeliest(torch.tensor([[0.25, 0.5, 0.25]]).log())
        ([1], [0.25])
    """
    first, at = told.max(-1, keepdim=True)
    second = told.scatter(-1, at, -torch.inf).amax(-1, keepdim=True)
    return at.flatten().tolist(), (first.exp() - second.exp()).flatten().tolist()
