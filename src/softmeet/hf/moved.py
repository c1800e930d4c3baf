"""How far ``meet`` moves an ensemble's pool, on a text or on one that the ensemble samples, always the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet.hf.sampling import RowSampler
from softmeet.rules.movement import Movement
from softmeet.rules.settings import Settings, rule_of

if TYPE_CHECKING:
    from softmeet.hf.modeling import EnsembleForCausalLM

_PROMPT, _SEED = "The", 0
# Nats; what moves less is of no interest.
_TOL = 1e-5


@torch.inference_mode()
def own_text(model: EnsembleForCausalLM, count: int) -> list[Float[Tensor, "t _"]]:
    """Sample tokens from the pool of an ensemble over tokens, and give each member's hidden states before them.

    Args:
        model: which has a tokenizer.
        count: tokens; fewer where the shortest context ends.
    """
    tokenizer: Any = model.tokenizer
    ids = tokenizer(_PROMPT, return_tensors="pt")["input_ids"].to(model.device)
    limit = getattr(model.config, "max_position_embeddings", None)
    count = count if limit is None else min(count, limit - ids.shape[1])
    settings = model.settings.ungated().changed(rule=model.settings.pool, rule_temperature=1.0, bands=1, trust=0.0)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), settings=settings, row_sampler=RowSampler(_SEED, [0]), do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=count, min_new_tokens=count,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return [states[ids.shape[1] - 1 :] for states in model.hidden_states(out[:, :-1])]


def as_meet(settings: Settings) -> Settings:
    """Give the settings by which ``meet`` would answer everywhere, to a small tolerance, with finite trusts."""
    rule = settings.rule if settings.rule.tilts_pool and not settings.rule.is_feasible else rule_of("meet")
    plain = settings.ungated().relaxed()
    return plain.model_copy(update={"rule": rule, "rule_temperature": 1.0, "tol": min(_TOL, plain.tol)})


@torch.inference_mode()
def moved(model: EnsembleForCausalLM, hidden: Sequence[Float[Tensor, "t _"]]) -> Movement:
    """Measure how far ``meet`` would move the pool at some positions, from each member's hidden states."""
    found = [Movement.of(solution) for _, solution in model.combiner.solve_in_chunks(hidden, as_meet(model.settings))]
    return Movement.stacked(torch.cat([one.table() for one in found if one is not None]))
