"""What pins a trace to its members: hashes of heads and of the tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from softmeet.ensemble import Ensemble
from softmeet.heads import SoftmaxHead


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
    heads = ensemble.model.heads
    return {
        "members": [
            {"name": name, "width": head.d, "head": head_hash(head)}
            for name, head in zip(ensemble.names, heads, strict=True)
        ],
        "tokenizer": tokenizer_hash(ensemble.tokenizer),
    }
