"""What pins a trace to its members: hashes of heads and of the tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from softmeet.ensemble import Ensemble
from softmeet.heads import SoftmaxHead

# Of each parameter, about so many numbers are hashed.
_SAMPLED = 1024


def head_hash(head: SoftmaxHead) -> str:
    """SHA-256 of a head's numbers as fp32, so that loading them in a wider dtype changes nothing."""
    digest = hashlib.sha256(repr((head.v, head.d, head.scale, head.soft_cap)).encode())
    for _, block in head.blocks(torch.float32, cut=True):
        digest.update(block.cpu().contiguous().numpy().tobytes())
    if head.bias is not None:
        digest.update(head.bias.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary: which token has which id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def body_hash(model: torch.nn.Module) -> str:
    """SHA-256 over every parameter's name, shape and some of its numbers as fp32, evenly spread.

    Enough to tell a fine-tuned model, of whose head nothing has changed, from what it was made of, at no cost. What is
    not in memory counts by its shape.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(repr((name, tuple(parameter.shape))).encode())
        if not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // _SAMPLED)]
            digest.update(some.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def identity(ensemble: Ensemble) -> dict[str, Any]:
    """What a trace says of the members that made it."""
    model = ensemble.model
    facts: dict[str, Any] = {"prune": model.config.prune, "prefixes": model.config.prefixes} if model.over_bytes else {}
    return facts | {
        "members": [
            {
                "name": name,
                "width": width,
                "dtype": str(head.weight.dtype).removeprefix("torch."),
                "head": head_hash(head),
                "body": body_hash(member),
            }
            for name, width, head, member in zip(
                ensemble.names, model.widths, model.member_heads, model.members, strict=True
            )
        ],
        "tokenizer": tokenizer_hash(ensemble.tokenizer),
    }
