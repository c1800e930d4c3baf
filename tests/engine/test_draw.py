"""How tokens are chosen: one text alone and several together alike, by processors that are told what they read."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper

from softmeet.engine.draw import Draw, Noise, Sampling
from softmeet.engine.processors import REACH, following
from softmeet.errors import InvalidInputError
from softmeet.noise import gumbel
from softmeet.readers.transformers import TokenAlphabet

V, TEXTS = 30, [[k, *range(20)] for k in range(3)]
ALPHABET = TokenAlphabet(None, V, frozenset({0}))
LOG_PROBS = torch.randn(3, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1)


class Seen:
    """A processor that keeps the texts that it is called with."""

    def __init__(self):
        self.lengths = []

    def __call__(self, ids, scores):
        self.lengths.append(ids.shape[1])
        return scores


@pytest.mark.parametrize("greedy", [True, False])
def test_texts_together_and_alone_get_the_same_tokens(greedy):
    """As of a call of generate, and as on the server, where each text has a number of its own."""
    processors = [] if greedy else [TopKLogitsWarper(7)]
    options = {"temperature": 0.0} if greedy else {"top_k": 7}
    together = Draw(processors, None if greedy else Noise(5, [0, 1, 2], start=4))
    tokens, scores = together(torch.tensor(TEXTS), LOG_PROBS)
    assert scores.isfinite().sum(-1).tolist() == [V if greedy else 7] * 3
    alone = [Sampling(5, **options).begin(k, 4, [0], ALPHABET) for k in range(3)]
    found = [draw.behind(text, row) for draw, text, row in zip(alone, TEXTS, LOG_PROBS.split(1), strict=True)]
    assert torch.cat(found).equal(tokens)
    assert greedy == tokens.equal(LOG_PROBS.argmax(-1))


def test_positions_count_from_the_first_draw_if_no_start_is_given():
    scores, given, counted = torch.zeros(1, V), Noise(5, [3], start=4), Noise(5, [3])
    for k in range(9):
        wanted = gumbel(5, 3, k, V).argmax().item()
        assert given.draw(scores, 4 + k).item() == counted.draw(scores, 4 + k).item() == wanted


def test_processors_are_told_no_more_than_they_read():
    seen = Seen()
    Draw([seen], None, REACH).behind(TEXTS[0], LOG_PROBS[:1])
    Draw([seen], None).behind(TEXTS[0], LOG_PROBS[:1])
    assert seen.lengths == [REACH, len(TEXTS[0])]


def test_penalties_and_least_lengths_read_the_whole_text():
    repeated = LOG_PROBS.new_zeros(1, V)
    draw = Sampling(5, temperature=0.0, presence_penalty=1.0, logit_bias={5: 0.5}).begin(0, 1, [0], ALPHABET)
    # Tokens 0 to 19 came before, 5 long ago.
    assert draw.behind(TEXTS[0], repeated).tolist() == [20]
    ended = LOG_PROBS.new_zeros(1, V).index_fill(1, torch.tensor([0]), 9.0)
    assert Sampling(5, temperature=0.0, min_tokens=20).begin(0, 1, [0], ALPHABET).behind(TEXTS[0], ended).tolist() == [
        0
    ]
    assert Sampling(5, temperature=0.0, min_tokens=21).begin(0, 1, [0], ALPHABET).behind(TEXTS[0], ended).tolist() != [
        0
    ]


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan, torch.inf])
def test_where_nothing_can_be_drawn_it_is_said(bad):
    with pytest.raises(InvalidInputError, match="at least one is finite"):
        Noise(5, [0]).draw(torch.full((1, V), bad), 3)


def test_tokens_may_follow_any_others():
    assert following(ALPHABET) == []
