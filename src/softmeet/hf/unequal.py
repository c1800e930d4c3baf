"""What is said of weights: who counts how much, and a warning where equal ones are worse than a member alone.

The warning goes by what was measured, else by members' sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

from transformers import PreTrainedModel

from softmeet.derived import file_of
from softmeet.engine.unread import AVERAGE
from softmeet.errors import InvalidInputError
from softmeet.hf.remembered import keep, known, members_hash
from softmeet.members.member import short
from softmeet.members.reader_model import ReaderModel
from softmeet.rules.pools import PowerMean
from softmeet.rules.settings import Settings
from softmeet.rules.values import BY_SIZE, POOLS

if TYPE_CHECKING:
    from softmeet.hf.configuration import EnsembleConfig
    from softmeet.hf.protocol import AnyEnsemble

_log = logging.getLogger("softmeet.weights")
# A larger model has more than so many times the parameters of a smaller one. Of tiny models most are embeddings.
_RATIO, _TINY = 2.0, 10_000_000
# A loss in bits a byte that is worth a warning, and bytes of a text that say enough.
_LOSS, _ENOUGH = 0.001, 500
# Where measurements are kept, and under which key.
_FILE, _EQUAL = "weights.json", "equal"


class Measured(TypedDict):
    """What ``logit-mean`` with equal weights gains over the best member alone, on some text.

    Attributes:
        gain: in bits a byte, below 0 for a loss.
        margin: half of its 95 % interval.
        best: the number of the best member.
        bytes: of the text.
        weights: those that were fitted to it.
        said: what was advised if that is not to mix them, else an empty text.
        by: the command that measured it.
    """

    gain: float
    margin: float
    best: int
    bytes: int
    weights: Sequence[float]
    said: str
    by: str


@contextmanager
def unwarned() -> Iterator[None]:
    """Enter a context without the warning, for what measures how good members are."""
    before, _log.disabled = _log.disabled, True
    try:
        yield
    finally:
        _log.disabled = before


def remember_equal(model: AnyEnsemble, found: Measured) -> None:
    """Keep what equal weights of an ensemble's members were measured to gain, for :func:`warn_of_unequal`.

    What was measured on more text stays; nothing is kept of a short one.
    """
    before = _measured(model)
    if found["bytes"] < _ENOUGH:
        return
    if before is None or before["bytes"] <= found["bytes"]:
        keep(file_of(_FILE), members_hash(model), _EQUAL, found)


def _measured(model: AnyEnsemble) -> Measured | None:
    """Return what is kept of an ensemble's members; None if there is nothing, or nothing of this form."""
    file = file_of(_FILE)
    own = known(file).get(members_hash(model)) if file.exists() else None
    found: Any = own.get(_EQUAL) if isinstance(own, dict) else None
    is_whole = isinstance(found, dict) and found.keys() == Measured.__annotations__.keys()
    return found if is_whole else None


def parameters(model: PreTrainedModel) -> int | None:
    """Return the number of a member's parameters; None of a reader that does not tell it."""
    if isinstance(model, ReaderModel):
        told: int | None = getattr(model.reader, "parameters", None)
        return told
    return int(sum(parameter.numel() for parameter in model.parameters()))


def unsized(settings: Settings) -> Settings:
    """Return settings with equal weights in place of those that go by members' sizes."""
    return settings.model_copy(update={"weights": None}) if settings.weights == BY_SIZE else settings


def weigh(config: EnsembleConfig, models: Sequence[PreTrainedModel], settings: Settings) -> None:
    """Give an ensemble weights in proportion to its members' numbers of parameters, if its settings say ``"auto"``.

    On SmolLM2-135M, Gemma 3 270M and Qwen2.5-Coder 0.5B and 1.5B, by twos and threes, such means of logits predict text
    better than the best of them (docs/reference/results.md). Who counts how much is then logged, as it is where the
    rule was taken because heads cannot be read.

    Args:
        config: the ensemble's, with its members' names.
        models: the members.
        settings: as they were asked for.

    Raises:
        InvalidInputError: if a member does not tell how many parameters it has.
    """
    by_size = settings.weights == BY_SIZE
    if by_size:
        sizes = [parameters(model) or 0 for model in models]
        if not all(sizes):
            raise InvalidInputError(
                f"expected weights as numbers, got {BY_SIZE!r}: {short(config.members[sizes.index(0)])} does not tell "
                "how many parameters it has"
            )
        config.weights = [size / sum(sizes) for size in sizes]
    for_heads = config.vocabulary == "tokens" and config.rule == AVERAGE != settings.rule.name
    if len(models) > 1 and (by_size or for_heads):
        equal = len(set(config.weights)) == 1
        shares = [f"1/{len(models)}" if equal else f"{weight:.2f}" for weight in config.weights]
        told = (f"{short(name)} {share}" for name, share in zip(config.members, shares, strict=True))
        _log.warning("mixed by %s: %s", config.rule, ", ".join(told))


def warn_of_unequal(model: AnyEnsemble) -> None:
    """Log a warning if the equal weights of an ensemble were measured to be worse than a member alone.

    Where nothing was measured (:func:`remember_equal`), it is logged if one member has more than twice the parameters
    of another: an average with equal weights loses to the better member where members differ by more than 0.06 bits a
    byte (docs/reference/results.md), which models of so different sizes mostly do.
    """
    rule = model.settings.rule
    if len(model.members) == 1 or not (rule.name in (*POOLS, PowerMean.name) or rule.tilts_pool):
        return
    names = list(map(short, model.config.members))
    if found := _measured(model) if rule.name == AVERAGE else None:
        if found["gain"] + found["margin"] < -_LOSS:
            _log.warning(
                "equal weights were worse than %s alone by %.3f ± %.3f bits a byte, as %s measured on a text of %s "
                "bytes: %s",
                names[found["best"]], -found["gain"], found["margin"], found["by"], f"{found['bytes']:,}",
                f"weights of {','.join(f'{weight:.2f}' for weight in found['weights'])} were fitted to it (--weights)"
                if found["weights"] else "--weights auto counts models by size",
            )  # fmt: skip
        elif found["said"]:
            _log.warning(
                "softmeet advise said of these, on a text of %s bytes: %s", f"{found['bytes']:,}", found["said"]
            )
        return
    sizes = {name: size for name, one in zip(names, model.members, strict=True) if (size := parameters(one))}
    large, small = (pick(sizes, key=sizes.__getitem__, default="") for pick in (max, min))
    if sizes and sizes[large] >= max(_TINY, _RATIO * sizes[small]):
        _log.warning(
            "equal weights, but %s has %.1f times the parameters of %s: such a mix is mostly worse than the larger "
            "model alone; --weights auto counts models by size, and softmeet advise says what a text of yours asks for",
            large, sizes[large] / sizes[small], small,
        )  # fmt: skip
