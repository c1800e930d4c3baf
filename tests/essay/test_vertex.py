"""A vertex keeps the moments, is not negative, and has no more tokens than the rank; so HiGHS cannot improve on it."""

import pytest
import torch

from softmeet.essay.matrices import dense_matrix
from softmeet.essay.vertex import vertex

pytestmark = pytest.mark.checked


@pytest.mark.parametrize(("N", "m", "rank"), [(300, 20, 20), (50, 20, 12), (7, 20, 7), (40, 1, 1)])
def test_vertices(N, m, rank):
    generator = torch.Generator().manual_seed(N)
    G = torch.randn(N, rank - 1, generator=generator, dtype=torch.float64) @ torch.randn(
        rank - 1, m - 1, generator=generator, dtype=torch.float64
    )
    G = torch.cat([G, torch.ones(N, 1, dtype=torch.float64)], dim=1)
    x = torch.rand(N, generator=generator, dtype=torch.float64) ** 20
    before = x.clone()
    found = vertex(dense_matrix(G), x)
    assert torch.equal(x, before)
    assert (found >= 0).all()
    assert (G.T @ (found - x)).abs().max() < 1e-10
    support = found.nonzero().squeeze(-1)
    assert len(support) <= rank
    assert torch.linalg.matrix_rank(G[support], rtol=1e-9) == len(support)


def test_a_vertex_stays_what_it_is():
    x = torch.tensor([0.0, 0.4, 0.0, 0.6], dtype=torch.float64)
    G = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [5.0, 1.0]], dtype=torch.float64)
    assert torch.equal(vertex(dense_matrix(G), x), x)
