"""The terms of the bound on the gap, against forty digits."""

import mpmath
import pytest
import torch

from softmeet.solvers.certificate import phi


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
