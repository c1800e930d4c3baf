"""Heads whose columns are nearly dependent, or hugely scaled: solved as any other, and verified."""

import pytest
import torch

from softmeet import Status, combine
from softmeet.simplex import kl
from softmeet.solvers import tuning
from softmeet.solvers.linalg import ridged_factor


def draws(seed):
    """A function that draws from the normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("condition", "scale"), [(3e4, 1.0), (1e6, 1.0), (1.0, 1e20), (1.0, 1e-25)])
def test_dense_steps_answer_as_the_full_hessian(dtype, condition, scale, monkeypatch):
    noise, sizes = draws(1), condition ** -torch.linspace(0, 1, 60, dtype=torch.float64)
    heads = [noise(4000, 60) * sizes @ torch.linalg.qr(noise(60, 60)).Q for _ in range(2)]
    heads, log_p = [(scale * W).to(dtype) for W in heads], (2 * noise(2, 4000)).log_softmax(-1)
    monkeypatch.setattr(tuning, "HESSIAN", 0)
    dense = combine(log_p.to(dtype), heads)
    monkeypatch.setattr(tuning, "HESSIAN", 2**40)
    full = combine(log_p, heads)
    assert dense.status == full.status == Status.OPTIMAL
    assert kl(full.log_probs, dense.log_probs.double()) <= 2e-3
    assert dense.verify(heads, log_p.to(dtype)).status == Status.OPTIMAL


def test_a_factor_is_found_whatever_the_matrix_holds():
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.05])).double()
    assert torch.allclose(
        ridged_factor(indefinite, 1e-3).square().diagonal(), torch.tensor([1.065, 1.065, 0.015]).double()
    )
    for wrong in (torch.nan, torch.inf, -5.0):
        assert (ridged_factor(torch.full((3, 3), wrong).double(), 1e-3) == torch.eye(3)).all()


@pytest.mark.parametrize("kind", ["huge", "near"])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_verify_answers_whatever_the_heads(kind, steps):
    noise = draws(0)
    heads = [1e21 * noise(40, 3) if kind == "huge" else noise(40, 1) + 1e-5 * noise(40, 3) for _ in range(2)]
    log_p = (4 * noise(2, 40)).log_softmax(-1)
    solution = combine(log_p, heads, max_steps=steps, tol=1e-9)
    status = solution.verify(heads, log_p).status
    assert status == Status.OPTIMAL or (status == Status.NOT_CONVERGED and steps < 50)


def test_a_row_whose_bound_runs_out_of_tokens_is_answered_alone_as_in_its_batch():
    noise = draws(3)
    heads = [noise(9, d) for d in (5, 6)]
    rows = torch.stack([15 * noise(4, W.shape[1]) @ W.T for W in heads]).log_softmax(-1).float()
    together = combine(rows, heads, trust=[0.3, torch.inf])
    alone = [combine(rows[:, k], heads, trust=[0.3, torch.inf]) for k in range(4)]
    assert (together.status == Status.OPTIMAL).all()
    assert all(one.status == Status.OPTIMAL for one in alone)
    for one, log_p in zip(alone, together.log_probs, strict=True):
        assert kl(one.log_probs.double(), log_p.double()) <= 2e-3
