"""The terms of the bound on the gap, against forty digits, and the price of moments that are left different."""

import mpmath
import pytest
import torch

from softmeet.heads import SoftmaxHead, WhitenedHead
from softmeet.simplex import kl
from softmeet.solvers.certificate import phi
from softmeet.solvers.leftover import moment_prices
from softmeet.solvers.newton import bound_after
from softmeet.solvers.projection import Point, Projection

pytestmark = pytest.mark.checked


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1.2e-5), (torch.float64, 1e-9)])
def test_phi_keeps_its_digits_near_zero_and_far(dtype, bound):
    mpmath.mp.dps = 40
    size = torch.logspace(-6, 1, 500, dtype=torch.float64)
    x = torch.cat([size, -size[size < 1], torch.tensor([-1.0])]).to(dtype)
    for given, found in zip(x.tolist(), phi(x).tolist(), strict=True):
        y = 1 + mpmath.mpf(given)
        exact = (y * mpmath.log(y) if y else 0) - given
        assert abs(found - exact) <= bound * exact
    assert phi(torch.zeros(1, dtype=dtype)).item() == 0


def test_a_bound_that_f_falls_through_is_none():
    bound, fall = torch.tensor([0.5, 0.5, 0.5, torch.inf]), torch.tensor([0.2, 0.5001, 0.7, 0.1])
    assert torch.allclose(bound_after(bound, fall, 1e-3), torch.tensor([0.3, 0.0, torch.inf, torch.inf]))


@pytest.mark.parametrize("sharpness", [1.0, 60.0])
def test_the_price_of_different_moments_pays_for_equal_ones(sharpness):
    """The point that the price is derived from: it has equal moments, though light tokens have far too little mass."""
    generator, v, trust = torch.Generator().manual_seed(3), 80, (0.3, 4.0)
    log_p = (sharpness * torch.randn(2, 3, v, generator=generator, dtype=torch.float64)).log_softmax(-1)
    weights = [torch.randn(v, d, generator=generator, dtype=torch.float64) for d in (5, 9)]
    views = tuple(WhitenedHead(SoftmaxHead(W), v, torch.float64, batch=3) for W in weights)
    problem = Projection(log_p.mean(0).log_softmax(-1), log_p.transpose(0, 1), views, trust, 1e-6)
    nu = torch.randn(3, 14, generator=generator, dtype=torch.float64)
    at = Point.at(problem, problem.scores(nu))
    prices = moment_prices(problem, *at.logs(problem))
    for i, h in enumerate(views):
        e = 1e-5 * torch.randn(3, h.rank, generator=generator, dtype=torch.float64)
        u = h.scores(e)
        more, less = u.clamp_min(0), (-u).clamp_min(0)
        whole = 1 + less.sum(-1, keepdim=True)
        p = (at.p + less) / whole
        r = torch.stack([(at.r[:, k] + (more if k == i else less)) / whole for k in range(2)], dim=1)
        assert torch.allclose(h.moments(r[:, i] - at.r[:, i] / whole)[0] * whole, e + h.moments(less)[0], atol=1e-12)
        spent = kl(p.log(), at.p.log()) + sum(rho * kl(r[:, k].log(), at.r[:, k].log()) for k, rho in enumerate(trust))
        assert (spent <= prices[:, i] * e.norm(dim=-1)).all()
