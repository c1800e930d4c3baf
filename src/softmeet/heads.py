"""The softmax head of a language model, and its whitened view, through which solvers read it.

A head's weight W, (v, d), is read in blocks of rows, which are cast to the dtype of the computation; W itself is never
cast or copied. The whitened head Q = (W - 1cᵀ) R has orthonormal columns, and is never stored: only the centre c, (d,),
and the factor R, (d, rank), are. v counts tokens, B the rows of a batch of problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from softmeet.errors import InvalidInputError
from softmeet.simplex import capped, log_normalize

# Elements of a block when it has to be cast: 4 MiB in fp32, about a core's share of cache.
_BLOCK_ELEMENTS = 1 << 20
# Singular values below this share of the largest count as zero: in fp32 products they are noise.
_RANK_TOLERANCE = 1e-6
# Centring an fp32 product cancels digits if columns' means exceed their spreads; past this ratio, products are fp64.
_LARGE_OFFSET = 30.0
# The most rows for which (W xᵀ)ᵀ can be the faster form of x Wᵀ, as in a step of generation for two to four sequences:
# torch's x Wᵀ takes two to four times as long for them in fp32 on a CPU as for one row, and (W xᵀ)ᵀ hardly longer;
# with one thread, if W has many more rows than columns.
MOST = 4
# The least elements of W for that: with several threads; and with one, for which W also has to have so many rows for
# each column, and four rows of x need still more of them.
LARGE, _LARGE_ALONE, _WIDE, _WIDER = 1 << 19, 1 << 22, 4, 16


def product(x: Float[Tensor, "b d"], weight: Float[Tensor, "v d"]) -> Float[Tensor, "b v"]:
    """Return x Wᵀ in the faster of two forms, which round differently; both are of one dtype and device.

    >>> product(torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([[2., 5.]])
    """
    return (weight @ x.T).T.contiguous() if is_faster_turned(x, weight, len(x)) else x @ weight.T


def is_faster_turned(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Return whether (W xᵀ)ᵀ is the faster form of the product of so many rows."""
    if not 1 < rows <= MOST or x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    if torch.get_num_threads() > 1:
        return weight.numel() >= LARGE
    wide = _WIDER if rows == MOST else _WIDE
    return weight.numel() >= _LARGE_ALONE and weight.shape[0] >= wide * weight.shape[1]


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


@dataclass(frozen=True, eq=False)
class SoftmaxHead:
    """The output layer of a language model: logits = cap(scale · (W h + β)) of a hidden state h.

    cap(x) is c·tanh(x / c) with a final soft-cap c, else x. Logits and log-probabilities are in nats.

    Args:
        weight: W, (v, d), any floating dtype; never cast or copied.
        bias: β, (v,), any floating dtype; None for zeros.
        scale: a factor on the logits.
        soft_cap: c > 0, or None for no soft-cap.

    Attributes:
        v: the number of tokens, padding included.
        d: the width of hidden states.
        device, dtype: the weight's, when the head was made.
        tails: a cache that solvers fill; of no use to others.

    Raises:
        InvalidInputError: if a shape does not fit, the weight is not floating, the soft-cap is not positive, or it or
            the scale is no finite number; from :meth:`whitening`, if the weight is not finite.

    Example:
        >>> head = SoftmaxHead(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), bias=torch.tensor([0.0, 0.0, 1.0]))
        >>> head.v, head.d, head.logits(torch.tensor([2.0, -1.0])).tolist()
        (3, 2, [2.0, -1.0, 1.0])
    """

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    v: int = field(init=False, repr=False)
    d: int = field(init=False, repr=False)
    device: torch.device = field(init=False, repr=False)
    dtype: torch.dtype = field(init=False, repr=False)
    _whitening: dict[tuple[torch.device, bool], Whitening] = field(default_factory=dict, repr=False)
    # A cache of solvers/direction.py: the tails of ensembles with this head as the first, by their whitenings.
    tails: list[tuple[tuple[Whitening, ...], object]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for part, what in ((self.weight, "weight"), (self.bias, "bias")):
            if not isinstance(part, Tensor) and (part is not None or what == "weight"):
                raise InvalidInputError(f"a head's {what} is a tensor, got {type(part).__name__}")
        if self.weight.ndim != 2 or not self.weight.is_floating_point():
            raise InvalidInputError(
                "a head's weight is a floating tensor of shape (v, d), got "
                f"{self.weight.dtype} of shape {tuple(self.weight.shape)}"
            )
        if 0 in self.weight.shape:
            raise InvalidInputError(f"a head has at least one row and one column, got {tuple(self.weight.shape)}")
        v, d = self.weight.shape
        vars(self).update(v=v, d=d, device=self.weight.device, dtype=self.weight.dtype)
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise InvalidInputError(f"a head's bias has shape ({self.v},), got {tuple(self.bias.shape)}")
        self._check_parts()

    def _check_parts(self) -> None:
        if self.soft_cap is not None and not (_is_finite(self.soft_cap) and self.soft_cap > 0):
            raise InvalidInputError(f"a soft-cap is a positive number or None, got {self.soft_cap!r}")
        if not _is_finite(self.scale):
            raise InvalidInputError(f"a head's scale is a finite number, got {self.scale!r}")

    def blocks(self, dtype: torch.dtype, *, cut: bool = False) -> Iterator[tuple[slice, Float[Tensor, "b d"]]]:
        """Yield (slice of tokens, W of these tokens in ``dtype``) for the whole head, a block at a time.

        Args:
            dtype: the dtype of the blocks, on the head's device.
            cut: divide W into blocks of about a million elements even if it has that dtype already; by default, it is
                then one block.

        Example:
            >>> [(rows, block.dtype) for rows, block in SoftmaxHead(torch.ones(3, 2)).blocks(torch.float64)]
            [(slice(0, 3, None), torch.float64)]
        """
        size = self.v if self.weight.dtype == dtype and not cut else max(1, _BLOCK_ELEMENTS // max(self.d, 1))
        for start in range(0, self.v, size):
            rows = slice(start, min(start + size, self.v))
            yield rows, self.weight[rows].detach().to(dtype)

    def scores(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
        """Return W x, without bias, scale and soft-cap, for every row x of a batch, in its dtype, by one read of W.

        Example:
            >>> SoftmaxHead(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).scores(torch.tensor([[2.0, 3.0]]))
            tensor([[2., 5.]])
        """
        if self.weight.dtype == x.dtype:
            weight = self.weight.detach()
            return product(x, weight) if 1 < len(x) <= MOST else x @ weight.T
        return torch.cat([x @ block.T for _, block in self.blocks(x.dtype)], dim=-1)

    def moments(self, p: Float[Tensor, "b v"]) -> Float[Tensor, "b d"]:
        """Return Wᵀ p for every row p of a batch, in the dtype of ``p``, by one read of the head.

        If p is a distribution over tokens, these are its moments: the expectation of W's rows under p.

        Example:
            >>> SoftmaxHead(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).moments(torch.tensor([[0.5, 0.5]]))
            tensor([[1.0000, 0.5000]])
        """
        total = p.new_zeros(p.shape[0], self.d)
        for rows, block in self.blocks(p.dtype):
            total += p[:, rows] @ block
        return total

    def logits(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Return the model's logits at its last hidden states, in nats, in fp32, or fp64 if ``hidden`` is fp64.

        Example:
            >>> SoftmaxHead(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), soft_cap=2.0).logits(torch.tensor([4.0, -4.0]))
            tensor([1.9281, 0.0000])
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        out = self.scores(hidden.reshape(-1, self.d).to(dtype))
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        if self.scale != 1 or self.soft_cap is not None:
            out = capped(out, self.scale, self.soft_cap)
        return out.reshape(*hidden.shape[:-1], self.v)

    def log_probs(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Return the log-softmax of :meth:`logits` at the last hidden states, in nats, in the dtype of the logits.

        Example:
            >>> SoftmaxHead(torch.zeros(4, 2)).log_probs(torch.ones(2)).exp()
            tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        return log_normalize(self.logits(hidden))

    def slope(self, logits: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"] | None:
        """Return 1 - (ℓ / c)², the derivative of the soft-cap c at capped logits ℓ, and 0 at -inf; None without c.

        Example:
            >>> SoftmaxHead(torch.ones(2, 1), soft_cap=2.0).slope(torch.tensor([1.0, -torch.inf]))
            tensor([0.7500, 0.0000])
        """
        if self.soft_cap is None:
            return None
        return torch.where(logits.isneginf(), 0.0, 1 - (logits / self.soft_cap) ** 2)

    def whitening(self) -> Whitening:
        """Compute the centre c and the factor R with which Q = (W - 1cᵀ) R has orthonormal columns; cached.

        c is the mean of W's rows, or 0 for a head with a soft-cap.

        Raises:
            InvalidInputError: if the weight, or its squares, are not finite.

        Example:
            >>> head = SoftmaxHead(torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
            >>> head.whitening().rank, head.whitening().center.tolist()
            (1, [2.0, 2.0])
        """
        key = (self.weight.device, self.soft_cap is None)
        if key not in self._whitening:
            self._whitening[key] = self._whiten(centred=self.soft_cap is None)
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
        # Columns are scaled to one length first, so that units do not decide the rank. Rounding in the centre leaves
        # a constant column, which should vanish, a length of about eps · |c| · √v.
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
    """The centre c and the factor R with which the columns of Q = (W - 1cᵀ) R are orthonormal, for a head's weight W.

    A vector ν in the coordinates of Q is λ = R ν in the coordinates of W, and ν = ``inverse`` λ. All tensors are fp64.

    Attributes:
        center: c, the mean of W's rows; zero for a head with a soft-cap.
        factor: R.
        inverse: the left inverse of R: ``inverse`` R is the identity.
        offset: the largest ratio |mean| / standard deviation of a column of W; 0 for a head with a soft-cap.
    """

    center: Float[Tensor, " d"]
    factor: Float[Tensor, "d rank"]
    inverse: Float[Tensor, "rank d"]
    offset: float

    @cached_property
    def rank(self) -> int:
        """The number of Q's columns: the numerical rank of W - 1cᵀ, or less if the whitening was cut."""
        return self.factor.shape[1]

    def to(self, device: torch.device) -> Whitening:
        """Return a copy of this whitening whose tensors are on ``device``."""
        return Whitening(self.center.to(device), self.factor.to(device), self.inverse.to(device), self.offset)


class WhitenedHead:
    """A whitened view of a head, through which solvers read it: Q = S (W - 1cᵀ) R for a batch of B rows.

    S is diagonal and has the slope of the head's soft-cap at each token, which differs between the rows of the batch;
    it is 1 without a soft-cap. Products with W run in ``dtype``, on the head's own device; results are on ``device``,
    and, unless a method says otherwise, in the dtype of its argument.

    Args:
        head: the head; if it has fewer than v rows, Q is zero at the tokens past its last row.
        v: the number of tokens.
        dtype: the dtype of products; fp64 in any case if columns' means exceed their spreads too far for fp32.
        slope: the diagonal of S in each row of the batch, as :meth:`SoftmaxHead.slope` returns it, and 0 past the
            head's last row; None for ones.
        batch: B, the number of rows.
        device: the device on which solvers compute; None for the head's own.
        whitening: c and R, a :class:`Whitening` of this head, perhaps cut; None for ``head.whitening()``.

    Attributes:
        rank: the number of Q's columns.
        rows_read: how many rows of W were read on behalf of each row of the whole batch, (B,).
        at: the indices, in the whole batch, of the rows that this view has.
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
        """Return a view that has only ``rows``, k indices among this view's rows.

        Both views share one tensor ``rows_read``, to which reads through either are added in place.
        """
        some = copy(self)
        some.at, some.slope = self.at[rows], None if self.slope is None else self.slope[rows]
        return some

    def scores(self, lam: Float[Tensor, "B rank"]) -> Float[Tensor, "B v"]:
        """Return the scores Q λ of each row's vector λ in whitened coordinates, Q the whitened head; one read of it."""
        x, center = self.raw(lam)
        out = self.head.scores(x.to(self.home, self.dtype)).to(self.device, lam.dtype) - center[:, None].to(lam)
        self.rows_read[self.at] += self.head.v
        return self._sloped(pad(out, (0, self.v - self.head.v)))

    def moments(self, *ps: Float[Tensor, "B v"]) -> list[Float[Tensor, "B _"]]:
        """Return the whitened moments Qᵀ p, (B, rank), of each tensor in ``ps``, by one read of the head for all.

        ``ps`` are one or more tensors of the same dtype, each with a row for every row of this view.
        """
        p = torch.cat([self._sloped(p) for p in ps])[:, : self.head.v]
        raw = self.head.moments(p.to(self.home, self.dtype)).to(self.device, torch.float64)
        self.rows_read[self.at] += self.head.v
        found = (raw - p.sum(-1, keepdim=True) * self.whitening.center) @ self.whitening.factor
        return list(found.to(p.dtype).chunk(len(ps)))

    def raw(self, lam: Float[Tensor, "B rank"]) -> tuple[Float[Tensor, "B d"], Float[Tensor, " B"]]:
        """Return x = R λ and y = cᵀ x in fp64: without a soft-cap's slopes, the scores Q λ are W x - y.

        c and R are the centre and factor of the whitening, W is the head's weight, and λ is in the coordinates of Q.
        """
        x = lam.double() @ self.whitening.factor.T
        return x, x @ self.whitening.center

    def _sloped(self, x: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
        return x if self.slope is None else x * self.slope.to(x.dtype)

    def rows(self, tokens: Int[Tensor, "B k"]) -> Float[Tensor, "B k d"]:
        """Return the weight's rows at k ``tokens`` for each row of the batch, in ``self.dtype``.

        They are centred and multiplied by the soft-cap's slopes, but not whitened: times R they are rows of Q.
        """
        found = self.even_rows(tokens, self.dtype)
        if self.slope is not None:
            found *= self.slope.gather(-1, tokens).to(self.dtype)[..., None]
        self.rows_read[self.at] += tokens.shape[-1]
        return found

    def gather(self, tokens: Int[Tensor, "B k"]) -> Float[Tensor, "B k rank"]:
        """Return the whitened head's rows at k ``tokens`` for each row of the batch, in ``self.dtype``."""
        return self.rows(tokens) @ self.whitening.factor.to(self.dtype)

    def even_rows(self, tokens: Int[Tensor, "*B k"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*B k d"]:
        """Return the weight's rows at ``tokens``, centred, without a soft-cap's slopes, and not counted as read.

        Rows are zero at tokens past the head's last row.
        """
        ids = tokens.clamp_max(self.head.v - 1).flatten().to(self.home)
        found = self.head.weight.detach().index_select(0, ids).to(self.device, dtype)
        found -= self.whitening.center.to(dtype)
        found = found.view(*tokens.shape, -1)
        if self.head.v < self.v:
            found *= (tokens < self.head.v).to(self.device, dtype)[..., None]
        return found

    def block(self, tokens: slice) -> Float[Tensor, "b d"]:
        """Return the weight's rows at a slice of tokens, not centred, in ``self.dtype``, on the head's device.

        A slice that ends past the head's last row gives fewer rows. They are not counted in ``rows_read``.
        """
        return self.head.weight[tokens].detach().to(self.dtype)


def as_head(head: SoftmaxHead | Tensor) -> SoftmaxHead:
    """Return ``head`` itself if it is a :class:`SoftmaxHead`; make a tensor W, (v, d), a head without bias.

    Raises:
        InvalidInputError: if W is not a floating tensor of two dimensions, or has no rows or no columns.
    """
    return head if isinstance(head, SoftmaxHead) else SoftmaxHead(head)
