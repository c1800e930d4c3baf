"""The terms of the bound on the gap, against forty digits."""

import mpmath
import pytest
import torch

from softmeet.solvers.certificate import phi
from softmeet.solvers.newton import bound_after


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
