"""What pins a trace to its members: hashes of heads and of the tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from softmeet.ensemble import Ensemble
from softmeet.heads import SoftmaxHead
from softmeet.members.identity import body_hash


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
