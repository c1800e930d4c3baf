"""Tiny members with tokens of their own, for decoders and their oracles: what follows a text is drawn by its tokens."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import rival_oracles
import torch

from softmeet.decoders.own_tokens import OwnTexts, OwnTokens


def member(words, *, ends=1, seed=0, spread=2.0, coarse=False, unknown=1):
    """A member of some words, ends, and ids that are neither; with ``coarse`` many of its probabilities are equal."""
    v = len(words) + ends + unknown
    order = np.random.default_rng(seed).permutation(v).tolist()
    tokens = {order[k]: word for k, word in enumerate(words)}
    end_ids = frozenset(order[len(words) : len(words) + ends])
    by_length = sorted(tokens.items(), key=lambda item: (-len(item[1]), item[0]))

    def encode(text):
        """Cut off the longest word that fits, again and again; a byte with which no word begins is left out."""
        found = []
        while text:
            token, word = next((one for one in by_length if text.startswith(one[1])), (None, text[:1]))
            found += [] if token is None else [token]
            text = text[len(word) :]
        return found

    @cache
    def probs(ids):
        generator = np.random.default_rng([seed, len(ids), *ids])
        if coarse:
            counts = generator.integers(0, 3, v)
            counts[min(tokens)] += 1
            return counts / 2 ** math.ceil(math.log2(counts.sum()))
        p = np.exp(generator.normal(size=v) * spread)
        p[generator.random(v) < 0.1] = 0
        p[min(tokens)] += 0.1
        return p / p.sum()

    return rival_oracles.TinyMember(tokens, end_ids, encode, probs)


class Rows:
    """Texts of one such member in rows, each behind its prompt."""

    def __init__(self, one, prompts, each):
        self._one, self.rows = one, each * len(prompts)
        self._prompts = [prompt for prompt in prompts for _ in range(each)]
        self._texts, self._closed = [()] * self.rows, [False] * self.rows
        self.calls = 0

    def log_probs(self, rows):
        assert len(set(rows)) == len(rows)
        assert not any(self._closed[row] for row in rows)
        self.calls += 1
        told = [self._one.probs((*self._prompts[row], *self._texts[row])) for row in rows]
        return torch.tensor([[math.log(p) if p else -math.inf for p in own] for own in told], dtype=torch.float64)[None]

    def add(self, rows, symbols):
        for row, symbol in zip(rows, symbols, strict=True):
            assert symbol in self._one.tokens
            assert not self._closed[row]
            self._texts[row] += (symbol,)

    def finish(self, rows):
        for row in rows:
            self._closed[row] = True

    def replace(self, rows, sources):
        texts, closed = list(self._texts), list(self._closed)
        for row, source in zip(rows, sources, strict=True):
            assert not closed[source]
            assert self._prompts[row] == self._prompts[source]
            self._texts[row], self._closed[row] = texts[source], False

    def symbols(self, row):
        return self._texts[row]


def own_texts(one, prompts, each):
    """What a decoder is given of such a member."""
    tokens = OwnTokens.of(((word, token) for token, word in one.tokens.items()), one.end_ids, one.encode)
    return OwnTexts(Rows(one, prompts, each), tokens)
