"""Weights in proportion to members' sizes: those of an average for which nobody gives any."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from softmeet.errors import InvalidInputError
from softmeet.hf.vocabulary import kind_of
from softmeet.members.gguf_head import stored_twice
from softmeet.members.gguf_tokenizer import known_file
from softmeet.members.member import Member, short
from softmeet.members.native import is_gguf, path_of
from softmeet.members.reader_model import ReaderModel
from softmeet.rules.settings import Settings
from softmeet.rules.values import BY_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from softmeet.hf.configuration import EnsembleConfig

_log = logging.getLogger("softmeet.weights")
# How weights may be quantised so that their number is still told.
_COUNTED = (None, "gguf", "torchao", "bitsandbytes")


@contextmanager
def untold() -> Iterator[None]:
    """Enter a context where nobody is told who counts how much, for commands to which no weights can be given."""
    before, _log.disabled = _log.disabled, True
    try:
        yield
    finally:
        _log.disabled = before


def parameters(name: str, model: PreTrainedModel) -> int:
    """Return the number of a member's parameters; 0 where it is not known.

    It is not of a reader that does not tell it, and of weights that a quantised checkpoint packs in a way of its own.
    An output layer that a GGUF file stores beside an embedding that is the same is counted once.
    """
    if isinstance(model, ReaderModel):
        found: int = getattr(model.reader, "parameters", None) or 0
    else:
        found = model.num_parameters() if getattr(model, "quantization_method", None) in _COUNTED else 0
    member = Member.parse(name)
    return found - stored_twice(known_file(path_of(member), name)[0]) if found and is_gguf(member) else found


def unsized(settings: Settings) -> Settings:
    """Return settings with equal weights in place of those that go by members' sizes."""
    return settings.model_copy(update={"weights": None}) if settings.weights == BY_SIZE else settings


def weigh(config: EnsembleConfig, models: Sequence[PreTrainedModel], settings: Settings) -> None:
    """Give an ensemble weights in proportion to its members' numbers of parameters, and log who counts how much.

    That is done if its settings say ``"auto"``, or have no weights and an average is the rule. On SmolLM2-135M, Gemma 3
    270M and Qwen2.5-Coder 0.5B and 1.5B, by twos and threes, such means of logits predict text better than the best of
    them (docs/reference/results.md). Without weights they stay equal where a member's size is not known, and over a
    union of tokens, where published methods have equal ones.

    Args:
        config: the ensemble's, with its members' names and the rule by which they are mixed.
        models: the members.
        settings: as they were asked for.

    Raises:
        InvalidInputError: if settings say ``"auto"``, and a member does not tell how many parameters it has.
    """
    is_asked, over_union = settings.weights == BY_SIZE, kind_of(config.vocabulary) == "union"
    is_usual = settings.weights is None and config.settings.rule.is_average and not over_union
    if len(models) == 1 or not (is_asked or is_usual):
        return
    sizes = list(map(parameters, config.members, models))
    if not all(sizes):
        if is_asked:
            raise InvalidInputError(
                f"expected weights as numbers, got {BY_SIZE!r}: {short(config.members[sizes.index(0)])} does not tell "
                "how many parameters it has"
            )
        return
    config.weights = [size / sum(sizes) for size in sizes]
    shares = [f"{weight:.2f}" for weight in config.weights]
    if len(set(shares)) > 1:
        told = ", ".join(f"{share} for {short(name)}" for name, share in zip(config.members, shares, strict=True))
        _log.warning("weights by size: %s; --weights %s makes them equal", told, ",".join("1" * len(models)))
