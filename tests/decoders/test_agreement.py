"""Agreement against a search that tries every combination of tokens."""

from __future__ import annotations

import numpy as np
import own_members
import pytest
import rival_oracles
import torch

from softmeet import Settings
from softmeet.decoders.agreement import Agreement
from softmeet.decoders.base import ToWrite

# Tokens that end within each other, two of the same bytes, and bytes that only some have.
WORDS = (
    (b"a", b"b", b"ab", b"ba", b"aba", b" a", b" ", b"ab"),
    (b"a", b"b", b"bb", b"abab", b" ab", b" ", b"b a"),
    (b"a", b"b", b"aa", b" b", b" ", b"a b", b"a"),
)


def members_of(n, seed, **options):
    return [own_members.member(WORDS[i], seed=10 * seed + i, ends=1 + i % 2, **options) for i in range(n)]


def searched(members, prompts, weights, beam, steps):
    settings = Settings(rule="logit-mean", weights=weights).for_members(len(members))
    decoder = Agreement(beam=beam)
    decoder.require(settings)
    texts = [own_members.own_texts(own, list(map(tuple, prompts)), decoder.rows(len(members))) for own in members]
    job = ToWrite(len(prompts), settings, steps, frozenset(members[0].end_ids), torch.Generator())
    return decoder.decode(texts, job)


def judge(members, weights, beam, steps, prompts=((), (0,))):
    for prompt, one in zip(prompts, searched(members, prompts, weights, beam, steps), strict=True):
        text, score = rival_oracles.agreement_search(
            members, [prompt] * len(members), np.array(weights), beam, steps, eager=True
        )
        best = one.texts[one.chosen]
        assert (best.text, best.log_weight) == (text.decode(), pytest.approx(score, abs=1e-9))


@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.75), (0.0, 1.0), (0.2, 0.3, 0.5), (0.5, 0.0, 0.5)])
@pytest.mark.parametrize("coarse", [False, True])
def test_it_finds_what_a_search_of_every_combination_finds(weights, beam, coarse):
    """Also where many scores are equal, so that the order of equals decides."""
    for seed in range(12 if len(weights) == 2 else 3):
        judge(members_of(len(weights), seed, coarse=coarse), weights, beam, steps=1 + seed % 6)
