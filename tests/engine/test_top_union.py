"""The union of each member's likeliest strings, over strings of two letters that some members lack."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import rival_oracles
import torch

from softmeet.engine.top_union import TopUnion
from softmeet.members.opaque import NoHead
from softmeet.rules.settings import Settings

LETTERS = (b"a", b"b", b"c")
WORDS = sorted([*LETTERS, *(x + y for x, y in product(LETTERS, LETTERS))])
END = len(WORDS)


def member(generator, lacking):
    """A member as oracles know it, of one distribution, and what stands for the words that it lacks."""
    own = dict(enumerate(word for word in WORDS if word not in lacking))
    p = generator.dirichlet(np.full(len(own) + 1, 0.3))
    where = {word: k for k, word in own.items()}
    tiny = rival_oracles.TinyMember(own, frozenset({len(own)}), lambda text: [where[text[:1]]], lambda state: p)
    told = torch.full((1, END + 1), -torch.inf, dtype=torch.float64)
    told[0, [*map(WORDS.index, own.values()), END]] = torch.tensor(p).log()
    return tiny, told, lambda k: WORDS.index(WORDS[k][:1]) if k < END and WORDS[k] in lacking else None


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_the_formulas_say(seed):
    generator = np.random.default_rng(seed)
    n, k = int(generator.integers(1, 4)), int(generator.integers(1, 6))
    longer = [word for word in WORDS if len(word) > 1]
    lacking = [{*generator.choice(longer, generator.integers(0, 7), replace=False).tolist()} for _ in range(n)]
    members, told, stands = zip(*(member(generator, some) for some in lacking), strict=True)
    w = generator.dirichlet(np.ones(n))
    expected = rival_oracles.top_union_distribution(members, [()] * n, w, k)
    combiner = TopUnion([str(i) for i in range(n)], [NoHead(END + 1)] * n, k, stands)
    settings = Settings.of({"rule": "prob-mean", "weights": tuple(w)}).for_members(n)
    for quickly in True, False:
        found = next(combiner.combined(told, settings, quickly=quickly)).ours
        ours = {(None if s == END else WORDS[s]): p for s, p in enumerate(found[0].exp().tolist()) if p}
        assert ours == pytest.approx({word: p for word, p in expected.items() if p}, abs=1e-9)
