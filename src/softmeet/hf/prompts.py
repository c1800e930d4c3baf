"""Prompts, texts and conversations, as the inputs of an ensemble's ``generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.engine.recorder import Recorder
from softmeet.errors import ContextError, InvalidInputError
from softmeet.hf.call_options import CallOptions
from softmeet.hf.chat import Messages, Tools, chat_of, is_chat
from softmeet.hf.contexts import OwnPrompt
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.running import NewTokens, behind, rereads
from softmeet.hf.sampling import RowSampler
from softmeet.hf.vocabulary import require_unicode
from softmeet.members.member import Member
from softmeet.members.prompting import ids_of, own_messages

# A text, or the turns of a conversation.
Prompt = str | Messages
# For each member its own tokens, or None.
Own = list[list[int] | None]


def encoded(
    model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Turn B prompts into the inputs of a model's ``generate``.

    Args:
        model: the ensemble.
        tokenizer: its tokenizer.
        prompts: texts, or conversations, which end where the answer begins. A member with a prompt of its own reads
            that first, or the text within it. A conversation each member reads in its own chat template.

    Returns:
        ``input_ids`` and ``attention_mask``, (B, t), on the model's device, padded on the left; also, where members
        read different things, ``own_prompts``, each member's own tokens in place of each prompt, or before it where
        these are no symbols.

    Raises:
        InvalidInputError: if there is no prompt, one is empty (but a text over bytes), is no UTF-8, or fills a member's
            context; or for the reasons of :meth:`ChatTemplates.own_prompts`.
    """
    require_unicode(*(cast(str, prompt) for prompt in prompts if not is_chat(prompt)))
    if not prompts or not (all(prompts) or model.begin is not None):
        raise InvalidInputError("expected a prompt of at least one token, got an empty one")
    read = [read_prompt(model, tokenizer, prompt) for prompt in prompts]
    for _, own in read:
        require_room(model, own)
    rows = [row for row, _ in read]
    length, limit = max(map(len, rows)), getattr(model.config, "max_position_embeddings", None)
    if not all(rows):
        raise InvalidInputError(f"expected a prompt of at least one token, got {list(prompts)!r}")
    if limit is not None and length >= limit:
        raise ContextError(
            f"expected a prompt shorter than the shortest member's context of {limit} tokens, got {length}: "
            "shorten the prompt"
        )
    pad = tokenizer.pad_token_id if length > min(map(len, rows)) else 0
    inputs = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    found: dict[str, Any] = {"input_ids": inputs.to(model.device), "attention_mask": mask.to(model.device)}
    if any(own is not None for _, own in read):
        nothing = [None] * len(model.config.members)
        found["own_prompts"] = [OwnPrompt(len(row) if model.begin is None else 0, one or nothing) for row, one in read]
    return found


def read_prompt(
    model: EnsembleForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    special: bool = True,
    tools: Tools | None = None,
) -> tuple[list[int], Own | None]:
    """Return what members read for a prompt: the tokens that they share, and what each reads of its own.

    Args:
        model: the ensemble.
        tokenizer: its tokenizer.
        prompt: a text or a conversation.
        special: whether a text begins with the token that begins texts, where the tokenizer puts one.
        tools: the functions that the answer to a conversation may call, of which each member's chat template tells.

    Returns:
        (the shared tokens; for each member its own tokens, in place of the shared ones, or before them where they are
        no symbols, or None for nothing of its own). None in place of the list if no member reads anything of its own.

    Raises:
        InvalidInputError: if a member has no chat template, or it refuses the conversation.
    """
    members = model.contexts.members
    own: Own | None = None
    if is_chat(prompt):
        row, own = _chat(model, members, cast(Messages, prompt), tools)
    else:
        if model.cuts_alone:
            return model.alphabet.encode(str(prompt)), model.own_prompt(str(prompt), special=special)
        row = list(tokenizer(prompt, verbose=False, add_special_tokens=special)["input_ids"])
        if model.begin is not None:
            # A template needs the text among each member's own tokens; else the text follows what is a member's own.
            if any(member.is_template for member in members):
                tokenizers = chat_of(model).tokenizers
                texts = zip(tokenizers, members, strict=True)
                row, own = [], [ids_of(each, member.reads(str(prompt)), special=special) for each, member in texts]
            row = row or [model.begin]
        elif any(member.prompt is not None for member in members):
            own = [
                None if member.prompt is None else ids_of(tokenizer, member.reads(str(prompt)), special=special)
                for member in members
            ]
    return row, own


def states_behind(model: EnsembleForCausalLM, inputs: dict[str, Any]) -> list[Float[Tensor, "B _"]]:
    """Run all members on the prompts that :func:`encoded` made; return each one's last hidden states behind them."""
    given = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    options = CallOptions.of(model, {"gate": "none", **given})
    cache, mask = None if rereads(model) else model.new_cache(), inputs["attention_mask"]
    shared = {"attention_mask": mask, "use_cache": False}
    hidden = behind(NewTokens(model, inputs["input_ids"], slice(-1, None), cache, options, shared)).hidden
    del cache
    model.close_dropped()
    return list(hidden)


def _chat(
    model: EnsembleForCausalLM, members: Sequence[Member], prompt: Messages, tools: Tools | None
) -> tuple[list[int], Own | None]:
    """Return what members read for a conversation, as :func:`read_prompt` does."""
    templates = chat_of(model)
    if all(member.prompt is None for member in members) and model.begin is None and not model.cuts_alone:
        shared = templates.shared_prompt(prompt, tools)
        if shared is not None:
            return shared, None
    own = templates.own_prompts([own_messages(member, prompt) for member in members], tools)
    return (own[0] if model.begin is None else [model.begin]), [*own]


def require_room(model: EnsembleForCausalLM, own: Sequence[Sequence[int] | None] | None) -> None:
    """Check that each member's own tokens leave room for at least one more in its context.

    Raises:
        ContextError: if they do not; the message names the member.
    """
    members = model.contexts.members
    for i, (member, ids) in enumerate(zip(members, own or (), strict=own is not None)):
        alone = [None] * i + [ids] + [None] * (len(members) - i - 1)
        if ids is not None and not model.contexts.room(alone):
            raise ContextError(
                f"expected a prompt that, as {member.title} reads it, is shorter than its context, got {len(ids)} "
                "tokens: shorten it, or the member's own"
            )


def arguments_of(
    model: EnsembleForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seed: int | None,
    recorder: Recorder | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of the model's ``generate``; without a length, text may fill the shortest context."""
    if "decoder" in options:
        raise InvalidInputError("decoder= writes whole texts, which come at their end: call generate or decode")
    inputs = encoded(model, tokenizer, prompts)
    usual = options.get("generation_config") or model.generation_config
    drawn = options.get("do_sample", bool(usual.do_sample) or seed is not None)
    # transformers would keep the 50 likeliest tokens where no number is given.
    whole = {"top_k": usual.top_k or 0} if drawn else {}
    found = {**inputs, "pad_token_id": tokenizer.pad_token_id, "do_sample": drawn, **whole, **options}
    room, limits = model.room(inputs["input_ids"].shape[1]), {"max_new_tokens", "max_length", "max_bytes"}
    if room is not None and not limits & {*found}:
        found["max_new_tokens"] = room
    sampler = RowSampler(seed, range(len(prompts))) if drawn and seed is not None else None
    more = {"recorder": recorder, "row_sampler": sampler}
    return found | {name: value for name, value in more.items() if value is not None}
