"""What tells one member from another: a hash of its parameters."""

from __future__ import annotations

import hashlib

import torch

# Of each parameter, about so many numbers are hashed.
_SAMPLED = 1024


def body_hash(model: torch.nn.Module) -> str:
    """Compute SHA-256 over every parameter's name, shape and some of its numbers as fp32, evenly spread.

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
