"""Rules of published methods that are no average of fixed weights, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import rival_oracles
import torch

import softmeet
from softmeet.errors import DisjointSupportError

CASES = {
    "pointwise-max": rival_oracles.maximum, "pointwise-min": rival_oracles.minimum,
    "drop:top=1": lambda p, w: rival_oracles.drop(p, w, 1), "drop:top=2": lambda p, w: rival_oracles.drop(p, w, 2),
    "core": rival_oracles.core, "core:main=true": lambda p, w: rival_oracles.core(p, w, main=True),
}  # fmt: skip


def drawn(seed, n=3, v=7):
    """Distributions of n members, with some zeros and ties, and weights; those of a sharp member among them."""
    generator = np.random.default_rng(seed)
    scores = np.round(generator.normal(size=(n, v)) * generator.choice([1, 6], (n, 1)), 1)
    p = np.exp(scores)
    p[:, generator.permutation(v)[:2]] *= generator.integers(0, 2, (n, 2))
    return p / p.sum(1, keepdims=True), generator.dirichlet(np.ones(n))


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("seed", range(40))
def test_rules_follow_their_formulas(rule, seed):
    p, w = drawn(seed, n=2 + seed % 3)
    found = softmeet.combine(torch.tensor(p).log(), [torch.eye(p.shape[1])] * len(p), rule, weights=w.tolist())
    assert found.log_probs.exp().numpy() == pytest.approx(CASES[rule](p, w), abs=1e-12)


def test_core_with_a_main_member_is_the_authors_code_but_for_what_reproduce_lists():
    """And each of the differences that it lists is one."""
    generator, apart = np.random.default_rng(5), dict[str, float]()

    def ours(z):
        return (
            softmeet.combine(torch.tensor(z).log_softmax(-1), [torch.eye(30)] * 3, "core:main=true")
            .log_probs.exp()
            .numpy()
        )

    def differs(name, found, coded):
        apart[name] = max(apart.get(name, 0.0), np.abs(coded / coded.sum() - found).sum() / 2)

    for _ in range(20):
        z = generator.normal(size=(3, 30)) * 2
        found, (coded, chosen) = ours(z), rival_oracles.core_as_coded(z, k=30)
        assert found == pytest.approx(coded / coded.sum(), abs=1e-12)
        cut, lossy = np.where(z >= np.sort(z, 1)[:, -10, None], z, -np.inf), np.eye(30) * generator.integers(0, 2, 30)
        differs("the ten likeliest", found, rival_oracles.core_as_coded(z)[0])
        differs("no filter for what is impossible", ours(cut), rival_oracles.core_as_coded(z)[0])
        differs("mass that is lost", found, rival_oracles.core_as_coded(z, k=30, maps=[lossy, lossy])[0])
        differs("choices", found, rival_oracles.core_as_coded(z, k=30, choice=True)[0])
        within = rival_oracles.core_as_coded(z, k=30, tokens=["x" * j for j in range(1, 31)])[1]
        apart["tokens within each other"] = apart.get("tokens within each other", 0.0) + (within != chosen)
    assert min(apart.values()) > 0.01, apart


def test_members_that_agree_on_nothing_have_no_minimum():
    members = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    with pytest.raises(DisjointSupportError):
        softmeet.combine(members, [torch.eye(2)] * 2, "pointwise-min")
    assert softmeet.combine(members, [torch.eye(2)] * 2, "pointwise-max").log_probs.exp().tolist() == [0.5, 0.5]
    assert softmeet.combine(members, [torch.eye(2)] * 2, "core").log_probs.exp().tolist() == [0.5, 0.5]


def test_a_member_that_is_certain_decides_alone_by_consistency():
    members = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.4, 0.4]], dtype=torch.float64).log()
    found = softmeet.combine(members, [torch.eye(3)] * 2, "core").log_probs.exp()
    assert found[0] > 1 - 1e-9
