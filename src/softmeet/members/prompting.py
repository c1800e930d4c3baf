"""What a member with a prompt of its own reads, as ids of its tokens: before every text, or for a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError
from softmeet.members import names as known
from softmeet.members.member import SLOT, Member
from softmeet.members.native import has_reader


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Return a text's token ids, with the token that begins a text if the tokenizer puts one, but none that ends it.

    Without ``special`` there is none that begins it, either.
    """
    ids: list[int] = tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
    if len(ids) < 2 or ids[-1] != tokenizer.eos_token_id:
        return ids
    plain: list[int] = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
    return ids if plain[-1:] == ids[-1:] else ids[:-1]


def prefix_of(member: Member, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Return the ids that a member reads before every text; None for what its tokenizer puts there.

    Example:
        >>> from softmeet.members.huggingface import load_tokenizers
        >>> member = Member("wide/gpt2", prompt="In the beginning")
        >>> prefix_of(member, load_tokenizers([member])[0])
        [694, 260, 2224, 1228]
    """
    return None if member.before is None else ids_of(tokenizer, member.before)


def own_messages(member: Member, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation that a member is told: its prompt opens it as the system's words.

    A prompt with ``{prompt}`` is put around the user's last words instead.
    """
    found = [dict(message) for message in messages]
    if member.prompt is None:
        return found
    if SLOT in member.prompt:
        last = max((k for k, one in enumerate(found) if one.get("role") == "user"), default=len(found) - 1)
        found[last]["content"] = member.reads(str(found[last]["content"]))
    elif found[0].get("role") == "system":
        found[0]["content"] = f"{member.prompt}\n\n{found[0]['content']}"
    else:
        found.insert(0, {"role": "system", "content": member.prompt})
    return found


def require_room(members: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase], **options: Any) -> None:
    """Check, before weights are loaded, that every member's prompt leaves room for a text in its context.

    Args:
        members: the members, each as a line of text.
        tokenizers: of the members, in the same order.
        options: keyword arguments of transformers' ``AutoConfig.from_pretrained``.

    Raises:
        InvalidInputError: if a prompt fills the context of its member.
    """
    for member, tokenizer in zip(map(Member.parse, members), tokenizers, strict=True):
        before = prefix_of(member, tokenizer)
        if before is None or has_reader(member):
            continue
        where = known.find(member)
        if "gguf_file" in where:  # of which reading the configuration alone takes as long as reading all
            continue
        config = transformers.AutoConfig.from_pretrained(**where, **options).get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and len(before) >= limit:
            raise InvalidInputError(
                f"expected a prompt of {member.title} shorter than its context of {limit} tokens, got {len(before)}: "
                "shorten it"
            )
