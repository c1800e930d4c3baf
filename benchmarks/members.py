"""Two members of GPT-2 small's shape with random weights: for decoding and memory, where only sizes count."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from softmeet.hf import EnsembleConfig, EnsembleForCausalLM

# Logits of about this standard deviation give a few nats of entropy over 50,257 tokens.
_SHARPNESS = 3.6


def save_pair(folder: Path, shared: float = 0.97) -> list[str]:
    """Write two checkpoints whose parameters have this correlation, so that their predictions are near too."""
    torch.manual_seed(0)
    first, second = GPT2LMHeadModel(GPT2Config()), GPT2LMHeadModel(GPT2Config())
    with torch.no_grad():
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            if a.ndim > 1:
                b.mul_((1 - shared**2) ** 0.5).add_(a, alpha=shared)
        for model in (first, second):
            scale = _SHARPNESS / (model.lm_head.weight.std() * model.config.n_embd**0.5)
            model.transformer.ln_f.weight.fill_(float(scale))
    names = [str(folder / name) for name in ("a", "b")]
    for name, model in zip(names, (first, second), strict=True):
        model.save_pretrained(name)
    return names


def load_pair(names: list[str]) -> list[PreTrainedModel]:
    """The models, in evaluation mode."""
    return [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for name in names]


def ensemble_of(names: list[str], models: list[PreTrainedModel], rule: str, trust: float = 0.3) -> EnsembleForCausalLM:
    """The two as one causal LM; they have no tokenizer, since every row of their heads is a token."""
    config = EnsembleConfig(members=names, rule=rule, trust=[trust] * len(names))
    model: EnsembleForCausalLM = EnsembleForCausalLM(config, models).eval()
    return model
