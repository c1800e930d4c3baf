"""Gradients through the solver: against finite differences, and between the two ways to solve for them."""

from __future__ import annotations

import pytest
import torch
from instances import outputs, random_heads

from softmeet.heads import SoftmaxHead, WhitenedHead
from softmeet.solvers.dual import iterate
from softmeet.solvers.implicit import adjoint, iterative, projected
from softmeet.solvers.newton import DualNewton
from softmeet.solvers.projection import Projection

pytestmark = pytest.mark.checked


def instance(batch=2, v=24, widths=(3, 4), sharpness=1.5):
    heads = random_heads(v, widths, seed=7)
    log_p = outputs(heads, batch, seed=7, sharpness=sharpness)
    views = tuple(WhitenedHead(SoftmaxHead(W), v, torch.float64, batch=batch) for W in heads)
    return Projection(log_p.mean(0).log_softmax(-1), log_p.transpose(0, 1), views, (1.0,) * len(heads), 1e-13)


def solve(problem):
    return iterate(DualNewton(), problem, 60)


@pytest.mark.parametrize("trust", [(0.05, 0.7), (1.0, 1.0), (3.0, 12.0)])
def test_gradcheck(trust):
    """In the trust, and in the weights behind the pool; the loss is any smooth function of log p."""
    problem = instance()
    seen = torch.linspace(-1, 1, 24, dtype=torch.float64)

    def answer(w, rho):
        pool = torch.einsum("n,bnv->bv", w, problem.log_p).log_softmax(-1)
        log_p = projected(Projection(pool, problem.log_p, problem.heads, problem.trust, problem.tol), rho, solve)
        return log_p[:, 3], (log_p.exp() * seen).sum(-1)

    w = torch.tensor([0.7, 0.4], dtype=torch.float64, requires_grad=True)
    rho = torch.tensor(trust, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(answer, (w, rho), eps=1e-5, atol=1e-6, rtol=1e-4)


def test_conjugate_gradients_solve_the_same_system_in_few_products_where_few_tokens_have_the_mass():
    """Without the preconditioner the first of the rows that are peaked is a sixth off by then."""
    sharp = {"v": 2000, "widths": (24, 40), "sharpness": 15.0}
    for peaked, ending in (({}, (1e-10,)), (sharp, (1e-4, 15))):
        problem = instance(batch=4, **peaked)
        state = solve(problem)
        width = sum(h.rank for h in problem.heads)
        b = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        direct, found = adjoint(problem, state, b), iterative(problem, state, b, *ending)
        assert torch.allclose((found * b).sum(-1), (direct * b).sum(-1), rtol=1e-4)
        assert peaked or torch.allclose(found, direct, rtol=1e-6, atol=1e-8)


def test_a_row_gets_the_gradient_that_it_gets_alone():
    problem = instance(batch=3)
    q = problem.log_q.clone().requires_grad_()
    rho = torch.tensor([0.4, 2.0], dtype=torch.float64)
    together = torch.autograd.grad(
        projected(Projection(q, problem.log_p, problem.heads, (1.0, 1.0), 1e-13), rho, solve)[:, 5].sum(), q
    )[0]
    for k in range(3):
        one = problem.take(torch.tensor([k]))
        own = one.log_q.clone().requires_grad_()
        alone = projected(Projection(own, one.log_p, one.heads, (1.0, 1.0), 1e-13), rho, solve)[:, 5].sum()
        assert torch.allclose(torch.autograd.grad(alone, own)[0], together[k : k + 1], atol=1e-9)
