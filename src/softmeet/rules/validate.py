"""Checks of the tensors that ``combine`` takes; its other arguments are checked by :mod:`.settings`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from softmeet.errors import InvalidInputError, NonFiniteError
from softmeet.heads import SoftmaxHead, WhitenedHead, as_head
from softmeet.norms import FinalNorm
from softmeet.rules.problem import Problem

# Half-precision log-probabilities sum to one only this well.
_NORMALISATION_TOLERANCE = 0.05


def checked_log_probs(log_probs: Float[Tensor, "n *b v"]) -> Float[Tensor, "n B v"]:
    """Check the members' log-probabilities, in nats; return them with one batch dimension, in fp64, normalised.

    Raises:
        InvalidInputError: if ``log_probs`` is not a floating tensor (n, *batch, v), or the probabilities of a row sum
            to less than exp(-0.05) or more than exp(0.05).
        NonFiniteError: if a row holds NaN or +inf, or only -inf; the message names the member.
    """
    if log_probs.ndim < 2 or not log_probs.is_floating_point() or 0 in (log_probs.shape[0], log_probs.shape[-1]):
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


def checked_heads(heads: Sequence[SoftmaxHead | Tensor], log_p: Float[Tensor, "n B v"]) -> tuple[SoftmaxHead, ...]:
    """Check that the members' heads fit their log-probabilities; return them as :class:`SoftmaxHead` objects.

    Args:
        heads: a head, or its weight W_i, (v, d_i), for each member. A head may have fewer than v rows if its member
            gives the tokens past its last row probability 0.
        log_p: the members' log-probabilities in nats, as :func:`checked_log_probs` returns them.

    Raises:
        InvalidInputError: if the number of heads is not n; a weight is not a floating tensor of two dimensions; or a
            head has more than v rows, or fewer while its member gives a token past its last row probability above 0.
    """
    n, _, v = log_p.shape
    found = tuple(as_head(head) for head in heads)
    if len(found) != n:
        raise InvalidInputError(f"expected one head per member, {n} in all, got {len(found)}")
    for i, head in enumerate(found):
        if head.v > v or not log_p[i, :, head.v :].isneginf().all():
            raise InvalidInputError(
                f"expected a head of {v} rows for member {i}, as its log-probabilities have {v} tokens, got "
                f"a weight of shape {tuple(head.weight.shape)}"
            )
    return found


def slopes_of(
    heads: Sequence[SoftmaxHead],
    logits: Float[Tensor, "n *b v"] | None,
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
            NonFiniteError if a logit is NaN or above its soft-cap.
    """
    if all(head.soft_cap is None for head in heads):
        return (None,) * len(heads)
    if logits is None:
        raise InvalidInputError("a head has a soft-cap: pass the members' capped logits as logits=, (n, *batch, v)")
    if logits.shape != shape:
        raise InvalidInputError(
            f"expected logits of shape {tuple(shape)}, as the log-probabilities, got {tuple(logits.shape)}"
        )
    flat = logits.detach().reshape(log_p.shape).double()
    for i, (head, member) in enumerate(zip(heads, flat, strict=True)):
        if head.soft_cap is not None and (member.isnan() | (member > head.soft_cap * 1.01)).any():
            raise NonFiniteError(
                f"expected capped logits of member {i}, none NaN and none above its soft-cap {head.soft_cap:g}, got a "
                f"largest value of {member.max().item():g}: pass what the model returns"
            )
    found: list[Float[Tensor, "B v"] | None] = []
    for head, member in zip(heads, flat, strict=True):
        slope = head.slope(member[:, : head.v])
        found.append(None if slope is None else pad(slope, (0, log_p.shape[-1] - head.v)))
    return tuple(found)


def checked_support(support: Bool[Tensor, " v"] | None, log_p: Float[Tensor, "n B v"]) -> Bool[Tensor, " v"] | None:
    """Check the mask of the tokens that may have positive probability, and return it unchanged.

    Args:
        support: the mask, True for such tokens; None, which is returned, for all tokens.
        log_p: the members' log-probabilities, for the number of tokens v.

    Raises:
        InvalidInputError: if ``support`` is neither None nor a bool tensor of shape (v,).
    """
    if support is not None and (support.dtype != torch.bool or support.shape != log_p.shape[-1:]):
        raise InvalidInputError(
            f"expected a bool mask of shape ({log_p.shape[-1]},), got {support.dtype} of shape {tuple(support.shape)}"
        )
    return support


def free_directions(
    heads: Sequence[SoftmaxHead],
    log_p: Float[Tensor, "n B v"],
    logits: Tensor | None,
    hidden: Sequence[Tensor] | None,
    shape: torch.Size,
) -> tuple[Float[Tensor, "B _ _"], ...]:
    """Return, for each member, the directions of its hidden states that its final norm removes, (B, k, d_i), fp64.

    The setting ``free_radial`` leaves moments along them unconstrained; k is 1, or 2 for a LayerNorm
    (:meth:`FinalNorm.lost_directions`).

    Args:
        heads: the members' heads with their norms; a head without one counts as having a plain RMS norm.
        log_p: the members' log-probabilities in nats.
        logits: the members' logits after soft-caps; None if no head has a soft-cap.
        hidden: the members' last hidden states, (*batch, d_i); None to recover them from the logits.
        shape: the shape (n, *batch, v) of the log-probabilities as the caller gave them.

    Raises:
        InvalidInputError: if the number or a shape of the hidden states does not fit, or they would have to be
            recovered from logits of -inf.
    """
    if hidden is None:
        scores = log_p if logits is None else logits.detach().reshape(log_p.shape).double()
        states = [
            _recovered(i, head, own[:, : head.v]) for i, (head, own) in enumerate(zip(heads, scores, strict=True))
        ]
    else:
        expected = [(*shape[1:-1], head.d) for head in heads]
        if [tuple(h.shape) for h in hidden] != expected:
            raise InvalidInputError(
                f"expected hidden states of shapes {expected}, got {[tuple(h.shape) for h in hidden]}"
            )
        states = [h.detach().reshape(-1, h.shape[-1]).double() for h in hidden]
    return tuple((head.norm or FinalNorm()).lost_directions(h) for head, h in zip(heads, states, strict=True))


def _recovered(i: int, head: SoftmaxHead, logits: Float[Tensor, "B v"]) -> Float[Tensor, "B d"]:
    """Recover member i's hidden states from its logits, up to components that do not change the logits.

    Raises:
        InvalidInputError: if a logit is -inf.
    """
    if logits.isneginf().any():
        raise InvalidInputError(
            f"the hidden states of member {i} cannot be recovered from infinite logits: pass them as hidden="
        )
    if head.soft_cap is not None:
        logits = head.soft_cap * (logits / head.soft_cap).clamp(-1 + 1e-12, 1 - 1e-12).atanh()
    own = logits / head.scale - (0.0 if head.bias is None else head.bias.to(logits))
    view = WhitenedHead(head, head.v, torch.float64, batch=len(own), device=logits.device)
    return view.moments(own)[0] @ view.whitening.factor.T


def restate(
    problem: Problem,
    heads: Sequence[SoftmaxHead | Tensor],
    log_probs: Tensor,
    logits: Tensor | None,
    hidden: Sequence[Tensor] | None = None,
) -> Problem:
    """Return a copy of ``problem`` with other heads and log-probabilities, which are checked, and with ``start`` None.

    Args:
        problem: the problem that was solved; its settings, support and dtype are kept.
        heads, log_probs, logits, hidden: as :func:`softmeet.combine` takes them.

    Raises:
        InvalidInputError: if the number of members, rows or tokens, or the heads' widths, differ from the problem's, or
            one of these arguments does not pass the checks of ``combine``; its subclass NonFiniteError if a value is
            NaN or infinite where ``combine`` refuses that.
    """
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
        free=free_directions(found, log_p, logits, hidden, log_probs.shape) if problem.settings.free_radial else (),
        start=None,
    )
