"""Refusals, with the reason, of options of ``generate`` that make sense for one model but not for an ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet.hf.cache import EnsembleCache

_REASONS = {
    "penalty_alpha": "contrastive search compares hidden states, and each member has its own",
    "dola_layers": "DoLa contrasts the layers of one model",
    "assistant_early_exit": "an early exit needs the layers of one model",
    "output_hidden_states": "each member has hidden states of its own: use model.hidden_states(input_ids)",
    "output_attentions": "each member has attentions of its own: ask model.members[i]",
    "inputs_embeds": "members share tokens, not embeddings: pass input_ids",
}


def refuse(generation_config: Any, options: Mapping[str, Any]) -> None:
    """Raise an error if an option of ``generate`` is set that has no meaning for an ensemble.

    Such are ``penalty_alpha``, ``dola_layers``, ``assistant_early_exit``, ``output_hidden_states``,
    ``output_attentions`` and ``inputs_embeds``; None and False count as not set.

    Args:
        generation_config: the generation configuration of the call, or None.
        options: the keyword arguments of the call, which take precedence.

    Raises:
        InvalidInputError: if such an option is set; the message names it and gives the reason.
    """
    for name, reason in _REASONS.items():
        given = options.get(name, getattr(generation_config, name, None))
        if given is not None and given is not False:
            raise InvalidInputError(f"{name} is not supported for an ensemble: {reason}")


def refuse_other_caches(generation_config: Any, given: Any) -> None:
    """Raise an error if a call is to use a cache that is not an ensemble's.

    Args:
        generation_config: the generation configuration of the call.
        given: the cache that the call was given, or None.

    Raises:
        InvalidInputError: if ``given`` is no :class:`EnsembleCache`, or ``cache_implementation`` is configured.
    """
    if given is not None and not isinstance(given, EnsembleCache):
        raise InvalidInputError(f"expected an EnsembleCache, as model.new_cache() gives, got {type(given).__name__}")
    if generation_config.cache_implementation is not None:
        raise InvalidInputError(
            f"an ensemble keeps one dynamic cache per member; cache_implementation="
            f"{generation_config.cache_implementation!r} is not supported: leave it out"
        )
