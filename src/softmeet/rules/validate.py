"""Checks of the tensors that ``combine`` takes; its other arguments are checked by :mod:`.settings`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad

from softmeet.errors import InvalidInputError, NonFiniteError
from softmeet.heads import SoftmaxHead, as_head
from softmeet.rules.problem import Problem

# Half-precision log-probabilities sum to one only this well.
_NORMALISATION_TOLERANCE = 0.05
_ARRAYS = (Tensor, np.ndarray, list, tuple)


def as_tensor(value: Any, what: str) -> Tensor:
    """Return an array of numbers as a tensor: a tensor itself; a NumPy array in its dtype; lists of numbers in fp64.

    Of a list of tensors or arrays, the tensors are stacked, in the dtype to which torch promotes theirs. Integers that
    are in no tensor become fp64. An array is not copied if torch can share its memory.

    Args:
        value: the array.
        what: what it is, for the message, such as ``"log_probs"``.

    Raises:
        InvalidInputError: if it is not an array of numbers or bools, its lists differ in length, torch does not know
            its dtype, or a tensor is sparse, nested, quantised or on the device ``meta``.

    Example:
        >>> as_tensor([[1, 2], [3, 4.5]], "x")
        tensor([[1.0000, 2.0000],
                [3.0000, 4.5000]], dtype=torch.float64)
    """
    if isinstance(value, Tensor):
        _refuse_without_values(value, what)
        return value
    try:
        if isinstance(value, list | tuple) and any(isinstance(part, _ARRAYS) for part in value):
            parts = [as_tensor(part, what) for part in value]
            dtype = reduce(torch.promote_types, (part.dtype for part in parts))
            return torch.stack([part.to(dtype) for part in parts])
        array = np.asarray(value)
        native = array.dtype.newbyteorder("=") if array.dtype.kind in "fb" else np.dtype(np.float64)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"its dtype is {array.dtype}")
        array = np.ascontiguousarray(array, native).reshape(array.shape)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except InvalidInputError:
        raise  # about a part
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"expected {what} as a tensor, a NumPy array, or lists of numbers of one length, got "
            f"{type(value).__name__}: {error}"
        ) from None


def _refuse_without_values(tensor: Tensor, what: str) -> None:
    """Refuse a tensor that is not a plain block of values; ``what`` it is says the message."""
    kind, remedy = "", ""
    if tensor.is_meta:
        kind, remedy = "one on the device meta, without values", "load the weights first"
    elif tensor.is_nested or tensor.layout != torch.strided:
        kind, remedy = "a nested or sparse one", "call to_dense() or to_padded_tensor() first"
    elif tensor.is_quantized:
        kind, remedy = "a quantised one", "call dequantize() first"
    if kind:
        raise InvalidInputError(f"expected {what} as a dense tensor, got {kind}: {remedy}")


def checked_log_probs(log_probs: Float[Tensor, "n *b v"]) -> Float[Tensor, "n B v"]:
    """Check the members' log-probabilities, in nats; return them with one batch dimension, in fp64, normalised.

    Raises:
        InvalidInputError: if ``log_probs`` is not a floating tensor (n, *batch, v) of at least 16 bits a number, or
            the probabilities of a row sum to less than exp(-0.05) or more than exp(0.05).
        NonFiniteError: if a row holds NaN or +inf, or only -inf; the message names the member.
    """
    coarse = not log_probs.is_floating_point() or log_probs.itemsize < 2  # torch cannot compute with those of 8 bits
    if log_probs.ndim < 2 or coarse or 0 in (log_probs.shape[0], log_probs.shape[-1]):
        raise InvalidInputError(
            "expected log-probabilities as a floating tensor (n members, *batch, v tokens), got "
            f"{log_probs.dtype} of shape {tuple(log_probs.shape)}"
        )
    flat = log_probs.detach().reshape(log_probs.shape[0], -1, log_probs.shape[-1]).double()
    total = _finite_total(flat)
    excess = total.squeeze(-1).abs()
    if excess.numel() and excess.max() > _NORMALISATION_TOLERANCE:
        member = int(excess.amax(-1).argmax())
        raise InvalidInputError(
            f"expected log-probabilities, but those of member {member} sum to exp({excess.max():.3g}): "
            "pass log_softmax(logits) (and the logits themselves as logits= if a head has a soft-cap)"
        )
    return flat - total


def normalised(scores: Float[Tensor, "n B v"]) -> Float[Tensor, "n B v"]:
    """Normalise the members' logits, or log-probabilities up to a constant, to log-probabilities in nats, fp64.

    ``scores`` is of any floating dtype, in nats, and is not changed in place.

    Raises:
        NonFiniteError: if a row holds NaN or +inf, or only -inf; the message names the member.
    """
    flat = scores.detach().double()
    return flat - _finite_total(flat)


def _finite_total(flat: Float[Tensor, "n B v"]) -> Float[Tensor, "n B 1"]:
    total = flat.logsumexp(-1, keepdim=True)
    if bool(total.isfinite().all()):
        return total
    bad = ~total.isfinite().squeeze(-1)
    member, row = bad.nonzero()[0].tolist()
    own = flat[member, row]
    what = "NaN" if own.isnan().any() else "+inf" if own.isposinf().any() else "only -inf"
    raise NonFiniteError(
        f"expected finite log-probabilities (or -inf for an impossible token), got {what} from member {member} "
        f"in {int(bad[member].sum())} of {flat.shape[1]} rows, first row {row}"
    )


def checked_heads(
    heads: Sequence[SoftmaxHead | Tensor | ArrayLike], log_p: Float[Tensor, "n B v"]
) -> tuple[SoftmaxHead, ...]:
    """Check that the members' heads fit their log-probabilities; return them as :class:`SoftmaxHead` objects.

    Args:
        heads: a head, or its weight W_i, (v, d_i), for each member, as :func:`as_tensor` takes it. A head may
            have fewer than v rows if its member gives the tokens past its last row probability 0.
        log_p: the members' log-probabilities in nats, as :func:`checked_log_probs` returns them.

    Raises:
        InvalidInputError: if the number of heads is not n; a weight is not a floating tensor of two dimensions; or a
            head has more than v rows, or fewer while its member gives a token past its last row probability above 0.
    """
    n, _, v = log_p.shape
    if not isinstance(heads, Iterable):
        raise InvalidInputError(f"expected a list of heads, one per member, {n} in all, got {type(heads).__name__}")
    found = tuple(as_head(_with_values(head, f"the head of member {i}")) for i, head in enumerate(heads))
    if len(found) != n:
        raise InvalidInputError(f"expected one head per member, {n} in all, got {len(found)}")
    for i, head in enumerate(found):
        if head.v > v or not log_p[i, :, head.v :].isneginf().all():
            raise InvalidInputError(
                f"expected a head of {v} rows for member {i}, as its log-probabilities have {v} tokens, got "
                f"a weight of shape {tuple(head.weight.shape)}"
            )
    return found


def _with_values(head: Any, what: str) -> SoftmaxHead | Tensor:
    """Return a head, or its weight as a tensor; refuse one whose weight or bias has no values."""
    if not isinstance(head, SoftmaxHead):
        return as_tensor(head, what)
    for part, name in ((head.weight, what), (head.bias, f"the bias of {what}")):
        if part is not None:
            _refuse_without_values(part, name)
    return head


def slopes_of(
    heads: Sequence[SoftmaxHead],
    logits: Float[Tensor, "n *b v"] | ArrayLike | None,
    log_p: Float[Tensor, "n B v"],
    shape: torch.Size,
) -> tuple[Float[Tensor, "B v"] | None, ...]:
    """Return, for each head, the derivative of its soft-cap at its member's logits; None for a head without one.

    Args:
        heads: the members' heads; tokens past a head's last row have the slope 0.
        logits: the members' logits after soft-caps; None if no head has a soft-cap.
        log_p: the members' log-probabilities, for their shape (n, B, v).
        shape: the shape that ``logits`` must have: that of the log-probabilities as the caller gave them.

    Raises:
        InvalidInputError: if a head has a soft-cap, and ``logits`` is None or has another shape; its subclass
            NonFiniteError if a logit is NaN, or beyond its soft-cap and not -inf.
    """
    if all(head.soft_cap is None for head in heads):
        return (None,) * len(heads)
    if logits is None:
        raise InvalidInputError("a head has a soft-cap: pass the members' capped logits as logits=, (n, *batch, v)")
    logits = as_tensor(logits, "logits")
    if logits.shape != shape:
        raise InvalidInputError(
            f"expected logits of shape {tuple(shape)}, as the log-probabilities, got {tuple(logits.shape)}"
        )
    flat = logits.detach().reshape(log_p.shape).double()
    found: list[Float[Tensor, "B v"] | None] = []
    for i, (head, member) in enumerate(zip(heads, flat, strict=True)):
        slope = head.slope(member[:, : head.v])
        found.append(None if slope is None else pad(slope, (0, log_p.shape[-1] - head.v)))
        if head.soft_cap is None:
            continue
        beyond = (member.abs() > head.soft_cap * 1.01) & ~member.isneginf()
        if (member.isnan() | beyond).any():
            raise NonFiniteError(
                f"expected capped logits of member {i}, none NaN and none beyond its soft-cap {head.soft_cap:g}, -inf "
                f"apart, got values of up to {member.masked_fill(member.isneginf(), 0).abs().max().item():g} in size: "
                "pass what the model returns"
            )
    return tuple(found)


def checked_support(
    support: Bool[Tensor, " v"] | ArrayLike | None, log_p: Float[Tensor, "n B v"]
) -> Bool[Tensor, " v"] | None:
    """Check the mask of the tokens that may have positive probability, and return it as a tensor.

    Args:
        support: the mask, True for such tokens; None, which is returned, for all tokens.
        log_p: the members' log-probabilities, for the number of tokens v.

    Raises:
        InvalidInputError: if ``support`` is neither None nor bools of shape (v,).
    """
    support = None if support is None else as_tensor(support, "support")
    if support is not None and (support.dtype != torch.bool or support.shape != log_p.shape[-1:]):
        raise InvalidInputError(
            f"expected a bool mask of shape ({log_p.shape[-1]},), got {support.dtype} of shape {tuple(support.shape)}"
        )
    return support


def restate(
    problem: Problem,
    heads: Sequence[SoftmaxHead | Tensor | ArrayLike],
    log_probs: Tensor | ArrayLike,
    logits: Tensor | ArrayLike | None,
) -> Problem:
    """Return a copy of ``problem`` with other heads and log-probabilities, which are checked, to verify its answer.

    It has neither ``start`` nor ``states``.

    Args:
        problem: the problem that was solved; its settings, support and dtype are kept.
        heads, log_probs, logits: as :func:`softmeet.combine` takes them.

    Raises:
        InvalidInputError: if the number of members, rows or tokens, or the heads' widths, differ from the problem's, or
            one of these arguments does not pass the checks of ``combine``; its subclass NonFiniteError if a value is
            NaN or infinite where ``combine`` refuses that.
    """
    log_probs = as_tensor(log_probs, "log_probs")
    log_p = checked_log_probs(log_probs)
    if log_p.shape != problem.log_p.shape:
        raise InvalidInputError(f"expected what was combined, {tuple(problem.log_p.shape)}, got {tuple(log_p.shape)}")
    found = checked_heads(heads, log_p)
    if [head.d for head in found] != [head.d for head in problem.heads]:
        raise InvalidInputError(f"expected heads of widths {[head.d for head in problem.heads]}, in the order combined")
    return replace(
        problem,
        log_p=log_p,
        heads=found,
        slopes=slopes_of(found, logits, log_p, log_probs.shape),
        start=None,
        states=(),
    )
