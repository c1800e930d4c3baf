import math

import pytest
import torch
from jaxtyping import TypeCheckError

from softmeet.simplex import entropy, kl, log_normalize, logit_mean, prob_mean, total_variation

pytestmark = pytest.mark.checked

P = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64).log()
Q = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64).log()


def test_shapes_are_checked_at_run_time():
    with pytest.raises(TypeCheckError):
        kl(P, Q[:, :3])


def test_entropy_and_kl_by_hand():
    assert entropy(P).item() == pytest.approx(1.5 * math.log(2))
    assert kl(P, Q).item() == pytest.approx(math.log(4) - 1.5 * math.log(2))
    assert kl(Q, P).item() == math.inf
    assert kl(P, P).item() == 0.0
    assert total_variation(P, Q).item() == pytest.approx(0.25)


def test_pools_by_hand():
    a, b = torch.tensor([0.8, 0.2]).double(), torch.tensor([0.4, 0.6]).double()
    both = torch.stack([a, b]).log()[:, None]
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    geometric = a**0.25 * b**0.75
    assert logit_mean(both, weights).exp()[0] == pytest.approx((geometric / geometric.sum()).tolist())
    assert prob_mean(both, weights).exp()[0] == pytest.approx((0.25 * a + 0.75 * b).tolist())


def test_pools_with_zeros_and_zero_weights():
    both = torch.stack([P, Q])
    one_sided = logit_mean(both, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.equal(one_sided, log_normalize(Q))
    assert logit_mean(both, torch.tensor([0.5, 0.5], dtype=torch.float64))[0, 3] == -math.inf
    assert prob_mean(both, torch.tensor([0.5, 0.5], dtype=torch.float64))[0, 3].exp() == pytest.approx(0.125)
    assert not prob_mean(both, torch.tensor([0.0, 1.0], dtype=torch.float64)).isnan().any()


def test_huge_logits():
    assert log_normalize(torch.tensor([1e4, 0.0, -1e4])).exp().tolist() == [1.0, 0.0, 0.0]
