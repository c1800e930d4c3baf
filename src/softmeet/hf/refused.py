"""Refusals, with the reason, of options of ``generate`` that make sense for one model but not for an ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor

from softmeet.errors import InvalidInputError
from softmeet.hf.cache import EnsembleCache
from softmeet.hf.configuration import EnsembleConfig

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
    others = [name for name in ("assistant_model", "custom_generate") if options.get(name) is not None]
    if others and options.get("speculate") not in (None, 0, "auto"):
        raise InvalidInputError(f"speculate is a way to generate, and {others[0]} another one: leave out one of both")


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


def checked_length(config: EnsembleConfig, input_ids: Int[Tensor, "B t"] | None, cache: Any) -> Int[Tensor, "B t"]:
    """Return ``input_ids``, or raise InvalidInputError if they are None or exceed the shortest member's context.

    Args:
        config: the ensemble's.
        input_ids: (B, t), the new tokens.
        cache: of the tokens before them, or None.
    """
    if input_ids is None:
        raise InvalidInputError("expected input_ids: members share tokens, not embeddings, so inputs_embeds is refused")
    require_context(config, input_ids.shape[1] + (0 if cache is None else cache.get_seq_length()))
    return input_ids


def require_context(config: EnsembleConfig, length: int) -> None:
    """Raise InvalidInputError if so many tokens exceed the shortest member's context."""
    limit = config.max_position_embeddings
    if limit is not None and length > limit:
        raise InvalidInputError(
            f"expected at most {limit} tokens, the shortest member's context, got {length}: shorten the prompt or "
            "lower max_new_tokens"
        )
