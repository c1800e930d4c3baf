"""What pins a trace to its members: hashes of heads and of the tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from softmeet.ensemble import Ensemble
from softmeet.heads import SoftmaxHead
from softmeet.members.identity import body_hash


def _head_hash(head: SoftmaxHead) -> str:
    """Compute SHA-256 of a head's numbers as fp32, so that loading them in a wider dtype changes nothing."""
    digest = hashlib.sha256(repr((head.v, head.d, head.scale, head.soft_cap)).encode())
    for _, block in head.blocks(torch.float32, cut=True):
        digest.update(block.cpu().contiguous().numpy().tobytes())
    if head.bias is not None:
        digest.update(head.bias.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def identity(ensemble: Ensemble) -> dict[str, Any]:
    """Return what a trace says of the members that made it.

    Returns:
        ``members``, each with its ``name``, the ``width`` and the ``dtype`` of its head, and hashes of the ``head`` and
        of a sample of all weights (``body``); ``tokenizer``, a hash of which token has which id; over bytes also
        ``prune`` and ``prefixes``.
    """
    model, vocabulary = ensemble.model, sorted(ensemble.tokenizer.get_vocab().items())
    facts: dict[str, Any] = {"prune": model.config.prune, "prefixes": model.config.prefixes} if model.over_bytes else {}
    members = zip(ensemble.names, model.widths, model.member_heads, model.members, strict=True)
    return facts | {
        "members": [
            {
                "name": name,
                "width": width,
                "dtype": str(head.weight.dtype).removeprefix("torch."),
                "head": _head_hash(head),
                "body": body_hash(member),
            }
            for name, width, head, member in members
        ],
        "tokenizer": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
    }
