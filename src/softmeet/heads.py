"""The softmax head of a language model, and its whitened view, through which solvers read it.

A head is read in blocks of rows. Blocks are cast to the dtype of the computation; the head itself never is, and it
is never copied: whitening goes through a d × d factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from softmeet.errors import InvalidInputError
from softmeet.norms import FinalNorm
from softmeet.simplex import log_normalize

# Elements of a block when it has to be cast: 4 MiB in fp32, about a core's share of cache.
_BLOCK_ELEMENTS = 1 << 20
# Singular values below this share of the largest count as zero: fp32 products could not tell them from noise.
_RANK_TOLERANCE = 1e-6
# Centring after an fp32 product loses as many digits as the means exceed the spreads by: past this, products are fp64.
_LARGE_OFFSET = 30.0


@dataclass(frozen=True, eq=False)
class SoftmaxHead:
    """The output layer of a language model: logits = cap(scale · (W h + β)) of a hidden state h.

    cap(x) is c·tanh(x / c) where a final soft-cap c is set, else x. Logits and log-probabilities are in nats.

    Args:
        weight: W, (v, d), any floating dtype; kept as it is, never copied.
        bias: β, (v,), any floating dtype; None for zeros.
        scale: a factor on the logits.
        soft_cap: c > 0, or None for none.
        norm: the model's last normalisation, whose output is h; only ``free_radial`` asks for it.

    Attributes:
        v: the number of rows: the vocabulary, padding included.
        d: the width.

    Raises:
        InvalidInputError: a shape does not fit, the weight is not floating, or the soft-cap is not positive; as soon as
            the head is whitened, the weight is not finite.

    Example:
        >>> head = SoftmaxHead(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), bias=torch.tensor([0.0, 0.0, 1.0]))
        >>> head.v, head.d, head.logits(torch.tensor([2.0, -1.0])).tolist()
        (3, 2, [2.0, -1.0, 1.0])
    """

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    norm: FinalNorm | None = None
    v: int = field(init=False, repr=False)
    d: int = field(init=False, repr=False)
    _whitening: dict[tuple[torch.device, bool, int | None], Whitening] = field(default_factory=dict, repr=False)
    # What solvers found of this head with others, and keep.
    tails: list[tuple[tuple[Whitening, ...], object]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or not self.weight.is_floating_point():
            raise InvalidInputError(
                "a head's weight is a floating tensor of shape (v, d), got "
                f"{self.weight.dtype} of shape {tuple(self.weight.shape)}"
            )
        if 0 in self.weight.shape:
            raise InvalidInputError(f"a head has at least one row and one column, got {tuple(self.weight.shape)}")
        vars(self).update(v=self.weight.shape[0], d=self.weight.shape[1])
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise InvalidInputError(f"a head's bias has shape ({self.v},), got {tuple(self.bias.shape)}")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise InvalidInputError(f"a soft-cap is a positive number or None, got {self.soft_cap}")

    def blocks(self, dtype: torch.dtype, *, cut: bool = False) -> Iterator[tuple[slice, Float[Tensor, "b d"]]]:
        """Yield (rows, W[rows] in ``dtype``) for the whole head: in blocks where it has to be cast, else at once.

        With ``cut``, in blocks in any case.

        Example:
            >>> [(rows, block.dtype) for rows, block in SoftmaxHead(torch.ones(3, 2)).blocks(torch.float64)]
            [(slice(0, 3, None), torch.float64)]
        """
        size = self.v if self.weight.dtype == dtype and not cut else max(1, _BLOCK_ELEMENTS // max(self.d, 1))
        for start in range(0, self.v, size):
            rows = slice(start, min(start + size, self.v))
            yield rows, self.weight[rows].detach().to(dtype)

    def scores(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
        """Return W x for every row of ``x``, in the dtype of ``x``; one read of the head.

        Example:
            >>> SoftmaxHead(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).scores(torch.tensor([[2.0, 3.0]]))
            tensor([[2., 5.]])
        """
        if self.weight.dtype == x.dtype:
            return x @ self.weight.detach().T
        return torch.cat([x @ block.T for _, block in self.blocks(x.dtype)], dim=-1)

    def moments(self, p: Float[Tensor, "b v"]) -> Float[Tensor, "b d"]:
        """Return Wᵀ p for every row of ``p``, in the dtype of ``p``; one read of the head.

        Of a distribution p, these are the expected rows of W: the moments that the I-projection matches.

        Example:
            >>> SoftmaxHead(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).moments(torch.tensor([[0.5, 0.5]]))
            tensor([[1.0000, 0.5000]])
        """
        total = p.new_zeros(p.shape[0], self.d)
        for rows, block in self.blocks(p.dtype):
            total += p[:, rows] @ block
        return total

    def logits(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Return the model's logits at its last hidden states, in nats: fp32, or fp64 for fp64 states.

        Example:
            >>> SoftmaxHead(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), soft_cap=2.0).logits(torch.tensor([4.0, -4.0]))
            tensor([1.9281, 0.0000])
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        out = self.scores(hidden.reshape(-1, self.d).to(dtype))
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        # A pass over the vocabulary for every position, where there is nothing to scale.
        out = out if self.scale == 1 else out * self.scale
        if self.soft_cap is not None:
            out = self.soft_cap * torch.tanh(out / self.soft_cap)
        return out.reshape(*hidden.shape[:-1], self.v)

    def log_probs(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Return the log-softmax of :meth:`logits`, in nats and in the same dtype.

        Example:
            >>> SoftmaxHead(torch.zeros(4, 2)).log_probs(torch.ones(2)).exp()
            tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        return log_normalize(self.logits(hidden))

    def slope(self, logits: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"] | None:
        """Return 1 - (ℓ / c)², the derivative of the soft-cap at capped logits ℓ; None without one, 0 at -inf.

        Example:
            >>> SoftmaxHead(torch.ones(2, 1), soft_cap=2.0).slope(torch.tensor([1.0, -torch.inf]))
            tensor([0.7500, 0.0000])
        """
        if self.soft_cap is None:
            return None
        return torch.where(logits.isneginf(), 0.0, 1 - (logits / self.soft_cap) ** 2)

    def whitening(self, rank: int | None = None) -> Whitening:
        """Find the centre and the factor that make the head's columns orthonormal, once per device.

        Args:
            rank: cut the (centred) head to that many of its largest singular directions; None for all of them.

        Raises:
            InvalidInputError: the weight is not finite, or its squares are not.

        Example:
            >>> head = SoftmaxHead(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
            >>> head.whitening().rank, head.whitening().center.tolist()
            (1, [2.0, 2.0])
        """
        key = (self.weight.device, self.soft_cap is None, rank)
        if key not in self._whitening:
            whole = self._whiten(centred=self.soft_cap is None) if rank is None else self.whitening()
            self._whitening[key] = whole if rank is None or rank >= whole.rank else whole.truncated(rank)
        return self._whitening[key]

    def _whiten(self, *, centred: bool) -> Whitening:
        center = torch.zeros(self.d, dtype=torch.float64, device=self.weight.device)
        if centred:
            for _, block in self.blocks(torch.float64, cut=True):
                center += block.sum(0) / self.v
        gram = center.new_zeros(self.d, self.d)
        for _, block in self.blocks(torch.float64, cut=True):
            gram.addmm_((block - center).T, block - center)
        if not gram.isfinite().all():
            raise InvalidInputError(
                "a head's weight must be finite, and its squares too: it holds NaN, inf or overflows"
            )
        # Columns are brought to one length first, so that their units do not decide the rank. Rounding in the centre
        # leaves a constant column a length of about eps · |c| · √v.
        lengths = gram.diagonal().sqrt()
        live = lengths > 1e-14 * center.abs() * self.v**0.5
        unit = torch.where(live, 1 / lengths, 0.0)
        values, vectors = torch.linalg.eigh(unit[:, None] * gram * unit)
        keep = values > max(values[-1].item() * _RANK_TOLERANCE**2, torch.finfo(values.dtype).tiny)
        offset = (center.abs() * self.v**0.5 * unit).max().item()
        factor = unit[:, None] * vectors[:, keep] / values[keep].sqrt()
        inverse = values[keep].sqrt()[:, None] * vectors[:, keep].T * torch.where(live, lengths, 0.0)
        return Whitening(center, factor, inverse, offset)


@dataclass(frozen=True)
class Whitening:
    """A centre c and a factor R such that Q = (W - 1cᵀ) R has orthonormal columns, all in fp64.

    Attributes:
        center: c: the mean row of W; zero for a head with a soft-cap.
        factor: R.
        inverse: its left inverse: ``inverse`` R = 1.
        offset: by how much the columns' means exceed their spreads, at most.
    """

    center: Float[Tensor, " d"]
    factor: Float[Tensor, "d rank"]
    inverse: Float[Tensor, "rank d"]
    offset: float

    @cached_property
    def rank(self) -> int:
        """The numerical rank of the (centred) head."""
        return self.factor.shape[1]

    def narrowed(self, basis: Float[Tensor, "rank k"]) -> Whitening:
        """Return the whitening whose Q is this one's times ``basis``, which has orthonormal columns."""
        return Whitening(self.center, self.factor @ basis, basis.T @ self.inverse, self.offset)

    def truncated(self, rank: int) -> Whitening:
        """Return the whitening of the ``rank`` largest singular directions of W - 1cᵀ = Q R⁻¹."""
        return self.narrowed(torch.linalg.svd(self.inverse, full_matrices=False).U[:, :rank])

    def without(self, directions: Float[Tensor, "k d"]) -> Whitening:
        """Return the whitening whose inverse measures lengths at right angles to ``directions``, which R leaves out."""
        basis = torch.linalg.qr(directions.to(self.inverse).T).Q
        return Whitening(self.center, self.factor, self.inverse - (self.inverse @ basis) @ basis.T, self.offset)

    def to(self, device: torch.device) -> Whitening:
        """Return this whitening on another device."""
        return Whitening(self.center.to(device), self.factor.to(device), self.inverse.to(device), self.offset)


class WhitenedHead:
    """A view of a head through which solvers read it: Q = S (W - 1cᵀ) R for a batch of B rows.

    S is the slope of a soft-cap, for each row of the batch, or 1. Products run in ``dtype``, on the head's own device,
    and come back on ``device`` in the dtype of what is given.

    Args:
        head: of at most v rows; it has no mass past its last row.
        v: the number of tokens.
        dtype: of products; fp64 in any case where columns' means exceed their spreads too far for fp32.
        slope: S, zero past the head's last row; None for 1.
        batch: B.
        device: where solvers compute; None for the head's own.
        whitening: c and R; None for the head's own.

    Attributes:
        rows_read: (B,), how many rows of W were read for each row of the batch, gathers included.
        at: which rows of that batch this view has.
    """

    def __init__(
        self,
        head: SoftmaxHead,
        v: int,
        dtype: torch.dtype,
        slope: Float[Tensor, "B v"] | None = None,
        batch: int = 1,
        device: torch.device | str | None = None,
        whitening: Whitening | None = None,
    ) -> None:
        self.head, self.v, self.slope = head, v, slope
        self.home, self.device = head.weight.device, torch.device(device or head.weight.device)
        self.whitening = whitening or head.whitening()
        if self.whitening.factor.device != self.device:
            self.whitening = self.whitening.to(self.device)
        self.dtype = torch.float64 if self.whitening.offset > _LARGE_OFFSET else dtype
        self.rank = self.whitening.rank
        self.rows_read = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.at = torch.arange(batch, device=self.device)

    def take(self, rows: Int[Tensor, " k"]) -> WhitenedHead:
        """Return a view for some rows of the batch; what it reads counts for them."""
        some = copy(self)
        some.at, some.slope = self.at[rows], None if self.slope is None else self.slope[rows]
        return some

    def scores(self, lam: Float[Tensor, "B rank"]) -> Float[Tensor, "B v"]:
        """Return Q λ for each row of the batch; one read of the head."""
        x, center = self.raw(lam)
        out = self.head.scores(x.to(self.home, self.dtype)).to(self.device, lam.dtype) - center[:, None].to(lam)
        self.rows_read[self.at] += self.head.v
        return self._sloped(pad(out, (0, self.v - self.head.v)))

    def moments(self, *ps: Float[Tensor, "B v"]) -> list[Float[Tensor, "B _"]]:
        """Return Qᵀ p for each of ``ps``; one read of the head for all of them."""
        p = torch.cat([self._sloped(p) for p in ps])[:, : self.head.v]
        raw = self.head.moments(p.to(self.home, self.dtype)).to(self.device, torch.float64)
        self.rows_read[self.at] += self.head.v
        found = (raw - p.sum(-1, keepdim=True) * self.whitening.center) @ self.whitening.factor
        return list(found.to(p.dtype).chunk(len(ps)))

    def raw(self, lam: Float[Tensor, "B rank"]) -> tuple[Float[Tensor, "B d"], Float[Tensor, " B"]]:
        """Return (x, c) with Q λ = W x - c, before any slope, in fp64."""
        x = lam.double() @ self.whitening.factor.T
        return x, x @ self.whitening.center

    def _sloped(self, x: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        return x if self.slope is None else x * self.slope.to(x.dtype)

    def rows(self, tokens: Int[Tensor, "B k"]) -> Float[Tensor, "B k d"]:
        """Return the rows ``tokens`` of S (W - 1cᵀ) for each row of the batch, in ``dtype``; times R, rows of Q."""
        found = self.even_rows(tokens, self.dtype)
        if self.slope is not None:
            found *= self.slope.gather(-1, tokens).to(self.dtype)[..., None]
        self.rows_read[self.at] += tokens.shape[-1]
        return found

    def gather(self, tokens: Int[Tensor, "B k"]) -> Float[Tensor, "B k rank"]:
        """Return the rows ``tokens`` of Q for each row of the batch, in ``dtype``."""
        return self.rows(tokens) @ self.whitening.factor.to(self.dtype)

    def even_rows(self, tokens: Int[Tensor, "*B k"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*B k d"]:
        """Return the rows ``tokens`` of W - 1cᵀ, without slopes and without counting them as read."""
        ids = tokens.clamp_max(self.head.v - 1).flatten().to(self.home)
        found = self.head.weight.detach().index_select(0, ids).to(self.device, dtype)
        found -= self.whitening.center.to(dtype)
        found = found.view(*tokens.shape, -1)
        if self.head.v < self.v:
            found *= (tokens < self.head.v).to(self.device, dtype)[..., None]
        return found

    def block(self, tokens: slice) -> Float[Tensor, "b d"]:
        """Return the rows ``tokens`` of W in ``dtype``, on the head's device; fewer past the head's last row.

        They are not counted as read.
        """
        return self.head.weight[tokens].detach().to(self.dtype)


def as_head(head: SoftmaxHead | Tensor) -> SoftmaxHead:
    """Return a head as it is, and a tensor (v, d) as a head without bias."""
    return head if isinstance(head, SoftmaxHead) else SoftmaxHead(head)
