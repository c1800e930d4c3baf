"""The noise of draws: its distribution, its independence, and what a seed determines."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare, gumbel_r, kstest, spearmanr

from softmeet.errors import InvalidInputError
from softmeet.noise import gumbel, noisy, require_seed

SCORES = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf])
COUNT = 4_000
# Arguments of which one alone changes from one draw to the next: neighbouring seeds, sequences and positions.
ALONG = {
    "seeds": lambda k: (k, 3, 7),
    "seeds, by their upper half": lambda k: (k << 32, 3, 7),
    "sequences": lambda k: (3, k, 7),
    "positions": lambda k: (3, 7, k),
    "all": lambda k: (k, k, k),
}


@pytest.mark.parametrize("along", ALONG)
def test_draws_follow_the_scores_and_are_independent_of_their_neighbours(along):
    drawn = noisy(SCORES.expand(COUNT, -1), [ALONG[along](k) for k in range(COUNT)]).argmax(-1)
    seen = drawn.bincount(minlength=5)
    assert seen[4] == 0
    assert chisquare(seen[:4], (SCORES[:4].double().softmax(-1) * COUNT).numpy()).pvalue > 1e-3
    table = np.zeros((4, 4))
    np.add.at(table, (drawn[0::2].numpy(), drawn[1::2].numpy()), 1)
    assert chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("along", ALONG)
def test_neighbouring_vectors_have_gumbels_law_and_no_correlation(along):
    vectors = [gumbel(*ALONG[along](k), 10_000).clone() for k in range(20)]
    assert kstest(torch.cat(vectors), gumbel_r.cdf).pvalue > 1e-3
    found = [spearmanr(one, other) for one, other in pairwise(vectors)]
    assert min(one.pvalue for one in found) > 1e-3 / len(found)
    # Shifted by one token, too: a counter that runs on would show there.
    assert min(spearmanr(one[1:], other[:-1]).pvalue for one, other in pairwise(vectors)) > 1e-3 / len(vectors)


def test_seed_sequence_position_and_symbol_are_told_apart_by_all_their_bits():
    places = [1 << bit for bit in range(64)]
    first = [
        *(gumbel(require_seed(seed), 0, 0, 2)[1].item() for seed in [0, *places]),
        *(gumbel(0, key, 0, 2)[1].item() for key in places),
        *(gumbel(0, 0, position, 2)[1].item() for position in places),
        *gumbel(0, 0, 0, 64)[[0, *range(2, 64)]].tolist(),
    ]
    assert len({*first}) == len(first)


@pytest.mark.parametrize("v", [1, 3, 4, 5, 50_257])
def test_a_tokens_noise_does_not_depend_on_how_many_there_are(v):
    assert gumbel(9, 8, 7, v).equal(gumbel(9, 8, 7, 60_000)[:v])


def test_a_seed_of_32_bits_more_is_another_and_one_past_64_is_refused():
    assert require_seed(-1) == 2**64 - 1
    assert not gumbel(1, 0, 0, 9).equal(gumbel(1 + 2**32, 0, 0, 9))
    for wrong in (2**64, -(2**63) - 1):
        with pytest.raises(InvalidInputError, match=f"expected a seed of 64 bits, .* got {wrong}"):
            require_seed(wrong)
    with pytest.raises(InvalidInputError, match="expected a seed that is an integer, got 'a'"):
        require_seed("a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_left_as_they_were(dtype):
    scores = torch.zeros(2, 5, dtype=dtype)
    found = noisy(scores, [(1, 0, 0), (1, 1, 0)])
    assert found.dtype == torch.float64
    assert not scores.any()
    assert torch.stack([gumbel(1, k, 0, 5) for k in range(2)]).equal(found)
