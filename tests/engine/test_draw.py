"""How tokens are chosen: one text alone and several together alike, by processors that are told what they read."""

from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper

from softmeet.engine.draw import Draw, Noise, Sampling, choose
from softmeet.engine.processors import following
from softmeet.errors import InvalidInputError
from softmeet.noise import gumbel
from softmeet.readers.token_alphabet import TokenAlphabet

V, TEXTS = 30, [[k, *range(20)] for k in range(3)]
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
    scores = together.scores(torch.tensor(TEXTS), LOG_PROBS)
    tokens = choose(scores, together.noise(len(TEXTS[0])))
    assert scores.isfinite().sum(-1).tolist() == [V if greedy else 7] * 3
    alone = [Sampling(5, **options).begin(k, 4, [0]) for k in range(3)]
    own = [draw.behind(text, row) for draw, text, row in zip(alone, TEXTS, LOG_PROBS.split(1), strict=True)]
    noise = [one for draw in alone for one in draw.noise(len(TEXTS[0]))]
    assert choose(torch.cat(own), noise).equal(tokens)
    assert greedy == tokens.equal(LOG_PROBS.argmax(-1))


def test_positions_count_from_the_first_draw_if_no_start_is_given():
    scores, given, counted = torch.zeros(1, V), Noise(5, [3], start=4), Noise(5, [3])
    for k in range(9):
        wanted = gumbel(5, 3, k, V).argmax().item()
        assert choose(scores, given.at(4 + k)).item() == choose(scores, counted.at(4 + k)).item() == wanted


def test_processors_are_told_no_more_than_they_read():
    seen = Seen()
    Draw([seen], None, 1).behind(TEXTS[0], LOG_PROBS[:1])
    Draw([seen], None).behind(TEXTS[0], LOG_PROBS[:1])
    assert seen.lengths == [1, len(TEXTS[0])]


def test_rows_without_noise_get_the_largest_score_beside_others():
    scores = LOG_PROBS[:2] - torch.tensor([[0.0], [5.0]])
    assert choose(scores, [None, (5, 3, 2)]).tolist() == [
        scores[0].argmax().item(), (scores[1] + gumbel(5, 3, 2, V)).argmax().item(),
    ]  # fmt: skip


def test_penalties_and_least_lengths_read_the_whole_text():
    def scores(**options):
        return Sampling(5, temperature=0.0, **options).begin(0, 1, [0]).behind(TEXTS[0], torch.zeros(1, V))[0]

    # Tokens 0 to 19 came before.
    assert scores(presence_penalty=1.0, logit_bias={5: 0.5}).tolist() == [-1.0] * 5 + [-0.5] + [-1.0] * 14 + [0.0] * 10
    assert scores(min_tokens=20).isfinite().all()
    assert following(TokenAlphabet(None, V, frozenset({0}))) == []  # tokens may follow any others
    assert scores(min_tokens=21).isneginf().nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan, torch.inf])
def test_where_nothing_can_be_drawn_it_is_said(bad):
    with pytest.raises(InvalidInputError, match="at least one is finite"):
        choose(torch.full((1, V), bad), [(5, 0, 3)])
