"""The readers of a server: one for each member, whatever ensembles it is in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from softmeet.engine.continuation import Runner
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.members.reader_model import ReaderModel
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.kinds import require_keys_and_values
from softmeet.readers.reader import Reader
from softmeet.server.sequences import members_of

_NO_ROWS = "its rows cannot join a running batch; use softmeet generate"


def readers_of(
    models: Iterable[EnsembleForCausalLM], names: Iterable[Iterable[str]], kept_tokens: int = 0
) -> dict[Any, Reader]:
    """Make a reader of every member of ensembles, one of those that several ensembles share.

    Args:
        models: the ensembles, in evaluation mode.
        names: for each, its members' names in messages.
        kept_tokens: for each member, the most prompt tokens whose keys and values are kept for prompts that begin
            alike. Such a prompt is run in other pieces, and so rounded otherwise.

    Raises:
        InvalidInputError: if a member's cache holds anything but keys and values, as a recurrent model's does.
    """
    found = dict[Any, Reader]()
    for model, own in zip(models, names, strict=True):
        for i, (member, name) in enumerate(zip(members_of(model), own, strict=True)):
            if key_of(member) in found:
                continue
            if not isinstance(member, ByteMember | ReaderModel):
                require_keys_and_values(name, member.config, _NO_ROWS)
            found[key_of(member)] = model.new_reader(i, name, kept_tokens)
    return found


def key_of(member: Runner) -> Any:
    """Return what a member's reader is found by: over bytes its model and spelling, whatever it reads before texts."""
    return (member.model, member.spelling) if isinstance(member, ByteMember) else member
