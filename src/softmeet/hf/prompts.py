"""Prompts, texts and conversations, as the inputs of an ensemble's ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError
from softmeet.hf.chat import Messages, chat_of, is_chat
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.vocabulary import require_unicode
from softmeet.members.covers import END

# A text, or the turns of a conversation.
Prompt = str | Messages


def encoded(
    model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Turn B prompts into the inputs of a model's ``generate``.

    Args:
        model: the ensemble.
        tokenizer: its tokenizer.
        prompts: texts, or conversations, which end where the answer begins. Over bytes each member begins after its
            own prompt, which its chat template makes.

    Returns:
        ``input_ids`` and ``attention_mask``, (B, t), on the model's device, padded on the left; with conversations over
        bytes also ``prefixes``, each member's own tokens before each prompt.

    Raises:
        InvalidInputError: if there is no prompt, one is empty (but a text over bytes), is no UTF-8, or fills the
            shortest member's context; or for the reasons of :meth:`ChatTemplates.own_prompts`.
    """
    require_unicode(*(cast(str, prompt) for prompt in prompts if not is_chat(prompt)))
    if not prompts or not (all(prompts) or model.over_bytes):
        raise InvalidInputError("expected a prompt of at least one token, got an empty one")
    rows = [_row(model, tokenizer, prompt) for prompt in prompts]
    length, limit = max(map(len, rows)), getattr(model.config, "max_position_embeddings", None)
    if not all(rows):
        raise InvalidInputError(f"expected a prompt of at least one token, got {list(prompts)!r}")
    if limit is not None and length >= limit:
        raise InvalidInputError(
            f"expected a prompt shorter than the shortest member's context of {limit} tokens, got {length}: "
            "shorten the prompt"
        )
    pad = tokenizer.pad_token_id if length > min(map(len, rows)) else 0
    inputs = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    found: dict[str, Any] = {"input_ids": inputs.to(model.device), "attention_mask": mask.to(model.device)}
    if model.over_bytes and any(map(is_chat, prompts)):
        nothing = [None] * len(model.config.members)
        found["prefixes"] = [
            chat_of(model).own_prompts(cast(Messages, prompt)) if is_chat(prompt) else nothing for prompt in prompts
        ]
    return found


def _row(model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the tokens of one prompt that all members share."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
        # A text begins after the symbol for the end of a text.
        return ids or ([END] if model.over_bytes else [])
    return [END] if model.over_bytes else chat_of(model).shared_prompt(prompt)
