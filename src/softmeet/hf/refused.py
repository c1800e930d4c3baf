"""What generate() does for one model and an ensemble cannot: refused by name, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softmeet.errors import InvalidInputError

_REASONS = {
    "penalty_alpha": "contrastive search compares hidden states, and each member has its own",
    "dola_layers": "DoLa contrasts the layers of one model",
    "assistant_early_exit": "an early exit needs the layers of one model",
    "output_hidden_states": "each member has hidden states of its own: use model.hidden_states(input_ids)",
    "output_attentions": "each member has attentions of its own: ask model.members[i]",
    "inputs_embeds": "members share tokens, not embeddings: pass input_ids",
}


def refuse(generation_config: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that have no meaning for an ensemble.

    Raises:
        InvalidInputError: one is set, in the call or in the generation configuration.
    """
    for name, reason in _REASONS.items():
        given = options.get(name, getattr(generation_config, name, None))
        if given is not None and given is not False:
            raise InvalidInputError(f"{name} is not supported for an ensemble: {reason}")
