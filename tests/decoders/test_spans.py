"""Spans of words against a slow search that was written from their description alone."""

from __future__ import annotations

import own_members
import pytest
import spans_oracle
import torch

from softmeet import Settings
from softmeet.decoders.base import ToWrite
from softmeet.decoders.spans import Spans

# Tokens that go on behind a word, that end one, that are nothing but whitespace, and two of the same bytes.
WORDS = (
    (b"a", b"b", b" a", b" b", b" ", b"ab", b"b a", b"a"),
    (b"a", b"b", b" ", b"\n", b"ba", b" ab", b"a b b"),
    (b"a", b"b", b" ", b"bb ", b"aa", b" ba"),
)
PROMPTS = ((), (0,), (1, 2))


def members_of(n, seed, *, coarse):
    """Some have two ends, but where equals count one, since a sum of two is only nearly equal to a third."""
    return [
        own_members.member(WORDS[i], seed=10 * seed + i, ends=1 + i % 2 * (not coarse), coarse=coarse) for i in range(n)
    ]


def written(members, prompts, weights, most, **options):
    settings = Settings(rule="logit-mean", weights=weights).for_members(len(members))
    decoder = Spans(**options)
    decoder.require(settings)
    texts = [own_members.own_texts(own, prompts, decoder.rows(len(members))) for own in members]
    return decoder.decode(texts, ToWrite(len(prompts), settings, most, frozenset(), torch.Generator()))


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0), (0.2, 0.3, 0.5)])
@pytest.mark.parametrize("options", [{}, {"margin": 0.2}, {"margin": 0.0, "words": 5}, {"words": 1}])
@pytest.mark.parametrize("coarse", [False, True])
def test_it_writes_what_the_description_says(weights, options, coarse):
    """Also where many probabilities are equal, and where a text is cut by its limit."""
    for seed in (0, 1, 3):
        members = members_of(len(weights), seed, coarse=coarse)
        most = 1 + 7 * seed
        for prompt, one in zip(PROMPTS, written(members, PROMPTS, weights, most, **options), strict=True):
            found = spans_oracle.spans_search(members, [prompt] * len(members), weights, most, **options)
            (text,) = one.texts
            assert (text.text.encode(), text.ended) == found[:2]
            assert text.log_probs == pytest.approx(found[2], abs=1e-9)
            assert members[0].end_ids.isdisjoint(text.symbols[:-1])
            assert (text.symbols[-1] in members[0].end_ids) == text.ended


def test_bytes_of_which_the_first_member_has_no_tokens_come_to_an_end_too():
    members = [own_members.member((word,), ends=0) for word in (b"a", b"b")]
    (found,) = written(members, [()], (1.0, 0.0), 3)
    text = spans_oracle.spans_search(members, [()] * 2, (1.0, 0.0), 3)[0]
    assert found.text.encode() == text == b"b" * 24 + b"a"
