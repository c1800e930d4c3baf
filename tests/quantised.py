"""Averages of quantised members by hand."""

from __future__ import annotations

import torch

WIDE = ("wide/llama", "wide/neox")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}


def by_hand(models, ids, count):
    """The greedy continuation of one text by the average of the members' own log-probabilities."""
    for _ in range(count):
        own = torch.stack([model(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1) for model in models])
        ids = torch.cat([ids, own.mean(0).argmax(-1, keepdim=True)], -1)
    return ids[0, -count:].tolist()
