"""The softmax heads of causal LMs of transformers: found by structure, checked against the logits, and compared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from softmeet.errors import CheckpointError, UnsupportedHeadError
from softmeet.heads import SoftmaxHead, Whitening
from softmeet.members.opaque import Head, OpaqueHead, is_readable, reason
from softmeet.members.placement import gives_logits, home, in_memory, let_give_logits, without_head
from softmeet.members.quantized import parts_of
from softmeet.members.reader_model import ReaderModel

# Names, in models' configurations, of factors of the logits and of a divisor; most configurations have none.
_FACTORS, _DIVISOR = ("logit_scale", "lm_head_multiplier"), "logits_scaling"
# Directions with a cosine above this are the same, up to the rounding of half-precision weights.
_SAME = 1 - 1e-4


def head_of(model: PreTrainedModel) -> Head:
    """Return a model's output layer, checked on three tokens: it gives the model's logits at the last hidden states.

    A plain linear layer is returned as a ``SoftmaxHead``, which shares the model's weights; offloaded ones are copied
    to the device that computes. Any other layer, quantised or adapted, is returned as an ``OpaqueHead``, which runs it.
    If neither gives the model's logits, these are computed in an unknown way: from then on, :func:`last_hidden` returns
    the logits themselves in place of hidden states. The model, a causal LM of transformers, is left in the mode,
    training or evaluation, in which it was.

    Raises:
        CheckpointError: if the model gives NaN.
        UnsupportedHeadError: if the model gives no logits.
    """
    if isinstance(model, ReaderModel):
        return model.head
    training = model.training
    model.eval()
    try:
        return _checked(model)
    finally:
        model.train(training)


def replace_weight(head: Head, model: PreTrainedModel) -> Head:
    """Return ``head`` with the model's present weight and bias, after the model has changed device or dtype.

    ``head`` is a result of :func:`head_of` or of this function for the same model. It is returned itself if the model's
    output layer is offloaded or a GGUF file's, since it holds a copy of that layer, and if it is opaque.
    """
    layer = model.get_output_embeddings()
    if isinstance(head, OpaqueHead) or layer is None or layer.weight.is_meta:
        return head
    return SoftmaxHead(layer.weight, layer.bias, head.scale, head.soft_cap)


@torch.inference_mode()
def _checked(model: PreTrainedModel) -> Head:
    """Find the output layer of a model in evaluation mode, as :func:`head_of` does."""
    ids = torch.arange(1, 4, device=home(model))[None] % model.get_input_embeddings().weight.shape[0]
    own = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    if own is None:
        raise UnsupportedHeadError(f"{type(model).__name__} gives no logits: expected a causal language model")
    if own.isnan().any():
        raise CheckpointError(
            f"expected logits from {type(model).__name__}, got NaN: its weights hold some, or are too large for "
            f"{model.dtype}; fetch it again, or load it in float32"
        )
    head = None if gives_logits(model) else _layer_of(model, own, ids)
    if head is not None:
        return head
    let_give_logits(model)
    why = f"is unknown ({type(model).__name__} computes its logits in a way that softmeet does not know)"
    return OpaqueHead(model, own.shape[-1], own.shape[-1], why)


def _layer_of(model: PreTrainedModel, own: Float[Tensor, "1 t v"], ids: Int[Tensor, "1 t"]) -> Head | None:
    """Return a model's output layer, to be read or to be run; None if its logits are not that layer's.

    Args:
        model: in evaluation mode.
        own: its logits at the tokens ``ids``.
        ids: a few token ids.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        return None
    config = model.config.get_text_config(decoder=True)
    scale = math.prod(getattr(config, key, None) or 1.0 for key in _FACTORS)
    scale /= getattr(config, _DIVISOR, None) or 1.0
    cap, weights = getattr(config, "final_logit_softcapping", None), in_memory(layer)
    head: Head
    if is_readable(layer) and not weights["weight"].is_meta:
        head = SoftmaxHead(weights["weight"], weights.get("bias"), scale, cap)
    else:
        head = OpaqueHead(model, own.shape[-1], 0, *reason(layer), scale, cap)
    try:
        hidden = without_head(model)(input_ids=ids, use_cache=False).last_hidden_state
        head = replace(head, d=hidden.shape[-1]) if isinstance(head, OpaqueHead) else head
        ours = head.logits(hidden.to(head.device)).to(own.device)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # its base model gives no hidden states, or the layer does not take them
    error = (own.float() - ours.float()).abs().max().item() if own.shape == ours.shape else math.inf
    largest = max(own.abs().max().item(), 1.0)
    return head if error <= 64 * torch.finfo(head.dtype).eps * largest else None


def one_head(heads: Sequence[Head]) -> bool:
    """Tell whether two or more heads, without soft-cap, are the same function of hidden states, and can be read.

    They are if their scales are equal, and weights and biases the same tensors or of equal values and dtypes, for which
    each head is read once.
    """
    read = [head for head in heads if isinstance(head, SoftmaxHead)]
    if len(read) < max(len(heads), 2):
        return False
    first, *others = read
    plain = all(head.soft_cap is None and head.scale == first.scale for head in read)
    parts = [(first.weight, other.weight) for other in others] + [(first.bias, other.bias) for other in others]
    return plain and all(_equal(*part) for part in parts)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Tell whether two tensors, or None, are one or have equal values, on whatever devices they are."""
    if a is None or b is None or a is b:
        return a is b
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.is_meta or b.is_meta:
        return False
    # The first row tells most apart, and saves reading the rest.
    return all(torch.equal(x.detach(), y.detach().to(a.device)) for x, y in ((a[:1], b[:1]), (a, b)))


def principal_cosines(a: SoftmaxHead, b: SoftmaxHead) -> Float[Tensor, " k"]:
    """Compute the cosines of the principal angles between the column spaces of two heads' centred matrices W.

    A matrix W (v, d) is centred by subtracting the mean of its rows. Rows past the end of the shorter matrix are left
    out. The cosines are the singular values of Q_aᵀQ_b, with Q an orthonormal basis of each space (Björck and Golub,
    Math. Comp. 27, 1973).

    Returns:
        (k,) fp64, the largest first; k is the smaller of the two ranks.
    """
    v, home = min(a.v, b.v), a.weight.device
    cross = torch.zeros(a.d, b.d, dtype=torch.float64, device=home)
    for rows, block in a.blocks(torch.float64, cut=True):
        other = b.weight[rows].detach().to(home, torch.float64)
        cross += block[: len(other)].T @ other[: len(block)]
    wa, wb = _whitening(a, v), _whitening(b, v)
    inner = cross - v * torch.outer(wa.center, wb.center.to(home))
    cosines: Tensor = torch.linalg.svdvals(wa.factor.T @ inner @ wb.factor.to(home))
    return cosines.clamp(0, 1)


def _whitening(head: SoftmaxHead, v: int) -> Whitening:
    """Return the whitening of the first v rows of a head, centred in any case."""
    centred = SoftmaxHead(head.weight[:v].detach()) if v < head.v or head.soft_cap is not None else head
    return centred.whitening()


def same_column_space(a: SoftmaxHead, b: SoftmaxHead) -> bool:
    """Tell whether the columns of two heads' centred matrices W - 1cᵀ (c the mean of W's rows) span the same space.

    They do if their ranks are equal and all :func:`principal_cosines` exceed 1 - 1e-4. The rule ``meet`` can do no more
    than average such members.
    """
    cosines = principal_cosines(a, b)
    ranks = a.whitening().rank, b.whitening().rank
    return ranks[0] == ranks[1] and bool((cosines > _SAME).all())


# About this many numbers of each parameter are hashed.
_SAMPLED = 1024


def body_hash(model: torch.nn.Module) -> str:
    """Compute the SHA-256 of every parameter's name, its shape and up to 2,047 of its numbers, evenly spread, as fp32.

    It tells a fine-tuned model from the original even if their heads are equal, in little time. Of parameters on the
    meta device (offloaded ones), only name and shape count. Returned in hexadecimal.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(repr((name, tuple(parameter.shape))).encode())
        for part in [] if parameter.is_meta else parts_of(parameter):
            flat = part.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // _SAMPLED)]
            digest.update(some.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
