"""The readers of a server: one for each member, whatever ensembles it is in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.readers.reader import Reader
from softmeet.readers.recurrent import RecurrentReader
from softmeet.readers.transformers import require_keys_and_values

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
        for i, name in enumerate(own):
            if model.key_of(i) in found:
                continue
            reader = found[model.key_of(i)] = model.new_reader(i, name, kept_tokens)
            if isinstance(reader, RecurrentReader):
                require_keys_and_values(name, model.members[i].config, _NO_ROWS)
    return found
