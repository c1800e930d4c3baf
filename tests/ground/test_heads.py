import pytest
import torch
from torch.overrides import TorchFunctionMode

import softmeet
from softmeet.errors import InvalidInputError
from softmeet.heads import SoftmaxHead, WhitenedHead
from softmeet.solvers import linalg, oracle
from softmeet.solvers.oracle import moments
from softmeet.solvers.projection import Point, Projection

pytestmark = pytest.mark.checked


def head(v=60, d=5, dtype=torch.float32, **kwargs):
    return SoftmaxHead(torch.randn(v, d, generator=torch.Generator().manual_seed(0)).to(dtype), **kwargs)


def test_logits_with_bias_scale_and_soft_cap():
    bias, h = torch.randn(60), torch.randn(2, 3, 5)
    found = head(bias=bias, scale=0.5, soft_cap=2.0).logits(h)
    expected = 2 * torch.tanh(0.5 * (h @ head().weight.T + bias) / 2)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(head(bias=bias).log_probs(h), (h @ head().weight.T + bias).log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_products_equal_dense_ones_whatever_the_dtype(dtype, compute, monkeypatch):
    monkeypatch.setattr("softmeet.heads._BLOCK_ELEMENTS", 64)
    W = head(dtype=dtype)
    x, p = torch.randn(3, 5, dtype=compute), torch.rand(3, 60, dtype=compute)
    assert torch.allclose(W.scores(x), x @ W.weight.to(compute).T, atol=1e-5)
    assert torch.allclose(W.moments(p), p @ W.weight.to(compute), atol=1e-4)


def test_gathered_rows_are_centred_and_nothing_past_the_last():
    view, tokens = WhitenedHead(head(d=7), 64, torch.float32, batch=2), torch.tensor([[3, 3, 59, 63], [60, 0, 17, 5]])
    rows = view.rows(tokens)
    assert (rows[0, 3] == 0).all()
    assert (rows[1, 0] == 0).all()
    assert torch.equal(rows[1, 3], view.head.weight[5] - view.whitening.center.float())
    assert view.rows_read.tolist() == [4, 4]


def test_whitening_is_orthonormal_and_finds_the_rank():
    W = head(d=6, dtype=torch.float64)
    W.weight[:, 5] = W.weight[:, 0] + 3
    W.weight[:, 4] = 2.5
    view = WhitenedHead(W, 60, torch.float64)
    Q = view.gather(torch.arange(60)[None])[0]
    assert view.rank == 4
    assert torch.allclose(Q.T @ Q, torch.eye(4, dtype=torch.float64), atol=1e-10)
    assert Q.sum(0).abs().max() < 1e-10


def test_views_agree_with_dense_algebra_under_a_soft_cap():
    W = head(dtype=torch.float64, soft_cap=3.0)
    logits = W.logits(torch.randn(2, 5, dtype=torch.float64))
    view = WhitenedHead(W, 60, torch.float64, W.slope(logits), batch=2)
    lam, p = torch.randn(2, view.rank, dtype=torch.float64), torch.rand(2, 60, dtype=torch.float64)
    for k, Q in enumerate(view.gather(torch.arange(60).expand(2, -1))):
        assert torch.allclose(view.scores(lam)[k], Q @ lam[k], atol=1e-10)
        assert torch.allclose(view.moments(p)[0][k], Q.T @ p[k], atol=1e-10)


class RowsRead(TorchFunctionMode):
    """Counts the rows of one weight that are sliced, gathered or multiplied by whole, by watching torch itself."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.rows = weight, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        reads = (torch.Tensor.__getitem__, torch.Tensor.index_select)
        if func in reads and args[0].data_ptr() == self.weight.data_ptr() and args[0].shape == self.weight.shape:
            self.rows += len(out)
        whole = func is torch.Tensor.matmul and args[1].data_ptr() == self.weight.data_ptr()
        if whole and args[1].shape == self.weight.T.shape:
            self.rows += len(self.weight)
        return out


@pytest.mark.parametrize("trust", [1.0, (0.5, 0.0)])
def test_num_passes_is_what_an_instrumented_head_sees(trust):
    W = [torch.randn(300, 4, dtype=torch.float64), torch.randn(300, 6, dtype=torch.float64)]
    heads = [SoftmaxHead(w) for w in W]
    for one in heads:
        one.whitening()
    log_p = torch.stack([torch.randn(1, w.shape[1], dtype=torch.float64) @ w.T for w in W]).log_softmax(-1)
    with RowsRead(heads[0].weight) as first, RowsRead(heads[1].weight) as second:
        solution = softmeet.combine(log_p, heads, trust=trust, tol=1e-9)
    assert solution.num_passes.item() > 0
    assert (first.rows * 4 + second.rows * 6) / (300 * 10) == pytest.approx(solution.num_passes.item())


@pytest.mark.parametrize("sharpness", [0.1, 40.0], ids=["flat", "one-hot, at different tokens"])
def test_points_and_the_hessian_in_blocks_equal_dense_algebra_and_count_their_reads(monkeypatch, sharpness):
    monkeypatch.setattr(linalg, "_CACHED", 320)
    torch.manual_seed(0)
    short, full = head(v=150, d=4, dtype=torch.float64), head(v=200, d=5, dtype=torch.float64)
    views = tuple(WhitenedHead(W, 200, torch.float64, batch=3) for W in (short, full))
    log_q = (sharpness * torch.randn(3, 200, dtype=torch.float64)).log_softmax(-1)
    log_p = (sharpness * torch.randn(3, 2, 200, dtype=torch.float64)).log_softmax(-1)
    problem = Projection(log_q, log_p, views, trust=(0.5, 4.0), tol=1e-4)
    assert len(oracle._blocks(problem)) > 1
    direction = sharpness * torch.randn(3, sum(h.rank for h in views), dtype=torch.float64)
    z = problem.scores(direction)
    assert [h.rows_read.tolist() for h in views] == [[150] * 3, [200] * 3]
    found = Point.at(problem, z)
    joint, own = found.logs(problem)
    assert torch.allclose(joint, problem.pooled(z), atol=1e-12)
    assert torch.allclose(own, problem.corrected(z), atol=1e-12)
    assert torch.allclose(found.value, problem.dual(z), atol=1e-12)
    Q = [h.gather(torch.arange(200)[None])[0] for h in views]

    def dual(nu):
        scores = torch.stack([A @ x for A, x in zip(Q, nu.split([h.rank for h in views]), strict=True)])[None]
        return Projection(log_q[:1], log_p[:1], views, (0.5, 4.0), 1e-4).dual(scores).sum()

    gradient = torch.autograd.functional.jacobian(dual, direction[0])
    assert torch.allclose(found.slope(problem, z)[0], gradient @ direction[0], atol=1e-10)
    before = [h.rows_read.clone() for h in views]
    second = moments(problem, joint, own)
    again = [((h.rows_read - reads) / h.head.v).tolist() for h, reads in zip(views, before, strict=True)]
    # Blocks that are made anew cost a member's rows once more.
    assert again == [[1] * 3] * 2 if sharpness < 1 else max(again[0]) == 2
    dense = torch.autograd.functional.hessian(dual, direction[0])
    assert torch.allclose(second.H[0], dense, atol=1e-10 * dense.abs().max())
    assert torch.allclose(problem.scale * (second.joint - second.own)[0], gradient, atol=1e-10)


def test_nothing_is_mutated_and_no_head_is_copied_whole():
    W = head(v=4000, d=8)
    before = W.weight.clone()
    log_p = torch.randn(1, 2, 4000).log_softmax(-1)
    softmeet.combine(log_p.expand(2, -1, -1), [W, head(v=4000, d=3)], trust=1.0)
    assert torch.equal(W.weight, before)
    assert next(W.blocks(torch.float32))[1].data_ptr() == W.weight.data_ptr()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftmaxHead(torch.zeros(3)), r"shape \(v, d\)"),
        (lambda: SoftmaxHead(torch.zeros(3, 2, dtype=torch.int8)), "floating"),
        (lambda: head(bias=torch.zeros(4)), r"bias has shape \(60,\), got \(4,\)"),
        (lambda: head(soft_cap=0.0), "positive"),
        (lambda: head(soft_cap="2"), "positive number or None, got '2'"),
        (lambda: head(soft_cap=torch.inf), "soft-cap"),
        (lambda: head(scale="x"), "scale"),
        (lambda: head(scale=torch.nan), "scale"),
        (lambda: SoftmaxHead("W"), "is a tensor, got"),
        (lambda: head(bias=[0.0] * 60), "is a tensor, got"),
        (lambda: SoftmaxHead(torch.full((3, 2), torch.nan)).whitening(), "finite"),
    ],
)
def test_bad_heads(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()
