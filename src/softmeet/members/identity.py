"""A hash of a member's parameters, by which members are told apart."""

from __future__ import annotations

import hashlib

import torch

from softmeet.members.quantized import parts_of

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
