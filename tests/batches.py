"""Sequences for the batcher over tiny members, what listens to them, and what generate() gives for each alone."""

from __future__ import annotations

import queue

import tiny
import torch

from softmeet.engine.draw import Sampling
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.hf.sampling import RowSampler
from softmeet.server.sequences import Combination, Failed, Finished, GenerationRequest, Sequence, Token

# Rotary, learned and offset positions, grouped heads, a sliding window, a soft-cap.
MEMBERS = ("gpt2", "llama", "opt projected", "gemma2 soft-cap")
LENGTHS = (3, 11, 1, 7, 30, 5, 2, 19)


def ensemble_of(names, rule="logit-mean"):
    config = EnsembleConfig(members=list(names), rule=rule, trust=1.0)
    model = EnsembleForCausalLM(config, [tiny.build(name, seed=k) for k, name in enumerate(names)]).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt(k, length):
    return tuple(torch.randint(1, tiny.V, (length,), generator=torch.Generator().manual_seed(k)).tolist())


class Listener(queue.SimpleQueue):
    """Collects a sequence's events."""

    def all(self):
        events = []
        while not events or not isinstance(events[-1], Finished | Failed):
            events.append(self.get(timeout=300))
        return events

    def tokens(self):
        return [e.token for e in self.all() if isinstance(e, Token)]


class Words:
    """A tokenizer whose tokens have their ids as texts."""

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def sequence(model, tokens, *, seed=5, key=0, max_tokens=12, rule=None, gate=None, sampling=(), **options):
    listener = Listener()
    changed = {name: value for name, value in (("rule", rule), ("gate", gate)) if value is not None}
    combination = Combination(model, model.settings.changed(**changed) if changed else model.settings)
    options = {"prompts": (tuple(tokens),), "tokenizer": Words()} | options
    request = GenerationRequest(combination, Sampling(seed=seed, **dict(sampling)), max_tokens, **options)
    return Sequence(request, tokens, key, listener.put), listener


def generated(model, tokens, *, seed=5, max_tokens=12, **options):
    """What generate() gives for one prompt alone."""
    options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "max_new_tokens": max_tokens} | options
    mask = torch.ones(1, len(tokens), dtype=torch.long)
    out = model.generate(torch.tensor([tokens]), attention_mask=mask, row_sampler=RowSampler(seed, [0]), **options)
    return out[0, len(tokens) :].tolist()
