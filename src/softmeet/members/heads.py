"""The softmax head of a transformers causal LM, found by its structure and checked against the model's own logits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from softmeet.errors import CheckpointError, UnsupportedHeadError
from softmeet.heads import SoftmaxHead
from softmeet.members.placement import in_memory
from softmeet.norms import FinalNorm

# Each factor multiplies the logits; None of these is set in most configs.
_DIVISORS = ("logits_scaling",)
_FACTORS = ("logit_scale", "lm_head_multiplier")


def head_of(model: PreTrainedModel) -> SoftmaxHead:
    """The model's output layer, sharing its weights; one that is offloaded is copied to the device that computes.

    Raises:
        UnsupportedHeadError: the layer is quantised, adapted or otherwise not a plain linear layer, or the
            head does not reproduce the model's logits.
        CheckpointError: the model gives NaN.
    """
    layer, name = model.get_output_embeddings(), type(model).__name__
    if layer is None:
        raise UnsupportedHeadError(f"{name} has no output layer: expected a causal language model")
    if type(layer) is not nn.Linear:
        raise UnsupportedHeadError(
            f"expected {name}'s output layer to be a plain linear layer, got {type(layer).__module__}."
            f"{type(layer).__name__}: load the model unquantised, and merge adapters into it first"
        )
    weights = in_memory(layer) if hasattr(layer, "_hf_hook") else dict(layer.named_parameters())
    if weights["weight"].is_meta:
        raise UnsupportedHeadError(
            f"{name}'s output layer is offloaded to where it cannot be read: load it with device="
        )
    if not layer.weight.is_floating_point():
        raise UnsupportedHeadError(f"{name}'s output layer is quantised ({layer.weight.dtype}): load it unquantised")
    config = model.config.get_text_config(decoder=True)
    scale = 1.0
    for key in _DIVISORS:
        scale /= getattr(config, key, None) or 1.0
    for key in _FACTORS:
        scale *= getattr(config, key, None) or 1.0
    cap, norm = getattr(config, "final_logit_softcapping", None), final_norm(model)
    head = SoftmaxHead(weights["weight"], weights.get("bias"), scale, cap, norm)
    _check(model, head)
    return head


def replace_weight(head: SoftmaxHead, model: PreTrainedModel) -> SoftmaxHead:
    """``head`` with the weight and bias that the model has now, after a move or a cast; a copy stays as it is."""
    layer = model.get_output_embeddings()
    if layer.weight.is_meta:
        return head
    return SoftmaxHead(layer.weight, layer.bias, head.scale, head.soft_cap, head.norm)


@torch.inference_mode()
def final_norm(model: PreTrainedModel) -> FinalNorm | None:
    """The normalisation whose output is the last hidden state; None if there is none of a known kind.

    It is found by what it does: the only norm outside the layers, run on vectors of ones and minus ones.
    """
    outside = [
        module
        for name, module in model.base_model.named_modules()
        if "norm" in type(module).__name__.lower() and not any(part.isdigit() for part in name.split("."))
    ]
    if len(outside) != 1 or model.config.hidden_size % 2:
        return None
    own = in_memory(outside[0]) if hasattr(outside[0], "_hf_hook") else dict(outside[0].named_parameters())
    weight = next(iter(own.values()), None)
    if weight is None or weight.is_meta or len(weight) != model.get_output_embeddings().weight.shape[1]:
        return None
    ones = torch.ones_like(weight)
    signs = ones.clone()
    signs[::2] = -1
    up, down, flat = (outside[0](x[None, None])[0, 0].float() for x in (signs, -signs, ones))
    bias = (up + down) / 2
    centred = bool((flat - bias).abs().max() < 1e-3 * (up - bias).abs().max())
    return FinalNorm(((up - down) / 2) * signs.float(), bias, centred)


@torch.inference_mode()
def _check(model: PreTrainedModel, head: SoftmaxHead) -> None:
    """Run three tokens through the model: a head that is read wrongly must never pass in silence."""
    ids = torch.arange(1, 4, device=head.weight.device)[None] % head.v
    training = model.training
    model.eval()
    own = model(input_ids=ids, use_cache=False).logits.float()
    ours = head.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    model.train(training)
    if own.isnan().any():
        raise CheckpointError(
            f"expected logits from {type(model).__name__}, got NaN: its weights hold some, or are too large for "
            f"{head.weight.dtype}; fetch it again, or load it in float32"
        )
    precision = torch.finfo(head.weight.dtype).eps
    scale = max(own.abs().max().item(), 1.0)
    if own.shape != ours.shape or not (own - ours).abs().max().item() <= 64 * precision * scale:
        raise UnsupportedHeadError(
            f"{type(model).__name__} computes its logits in a way that softmeet does not know: its head applied to its "
            "last hidden state does not give its logits"
        )
