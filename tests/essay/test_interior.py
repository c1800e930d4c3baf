"""The interior-point method on linear programs whose optima are ill-conditioned, against HiGHS."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from softmeet.essay import matrices
from softmeet.essay.interior import Program, interior_point
from softmeet.essay.matrices import dense_matrix

pytestmark = pytest.mark.checked


def linear(N, m, sharpness, seed):
    """A random cost over the distributions with the moments of a peaked one: the more so, the worse conditioned."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(N, m, generator=generator, dtype=torch.float64)
    G /= G.norm(dim=0)
    torch.rand(N, generator=generator, dtype=torch.float64)
    p = (sharpness * torch.randn(N, generator=generator, dtype=torch.float64)).softmax(-1)
    G = torch.cat([G, torch.ones(N, 1, dtype=torch.float64)], dim=1)
    cost = torch.randn(N, generator=generator, dtype=torch.float64)
    softness, start = torch.zeros(m + 1, dtype=torch.float64), torch.full((N,), 1 / N, dtype=torch.float64)
    return Program(dense_matrix(G), p @ G, cost, softness, start, m)


def highs(program):
    found = linprog(program.cost.numpy(), A_eq=program.columns.dense.T.numpy(), b_eq=program.target.numpy())
    assert found.status == 0
    return found.fun


def test_it_goes_on_while_complementarity_falls():
    """The moments are as near as rounding lets them be long before the optimum is: that is no reason to stop.

    Stopping there leaves 7e-6; rounding leaves 1e-6 on some processors.
    """
    program = linear(2000, 100, 10.0, 0)
    found = interior_point(program)
    assert found.merit < 3e-6
    assert float(program.cost @ found.x) == pytest.approx(highs(program), abs=1e-5)


def test_a_gram_matrix_leaves_out_only_what_rounding_loses():
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(5000, 30, generator=generator, dtype=torch.float64)
    weight = torch.rand(5000, generator=generator, dtype=torch.float64) * 1e-25
    weight[::100] = 10.0 ** -torch.arange(50, dtype=torch.float64).div(5)
    held = dense_matrix(G)
    assert len(matrices._counting(weight, torch.linalg.vecdot(held.dense, held.dense))) < 100
    exact = np.longdouble(G.numpy()).T @ (np.longdouble(weight.numpy())[:, None] * np.longdouble(G.numpy()))
    off = np.abs(held.gram(weight).numpy() - exact).max() / np.abs(exact).max()
    assert off < 1e-15
