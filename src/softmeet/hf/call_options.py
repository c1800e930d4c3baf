"""``CallOptions``: softmeet's own options of one call of an ensemble, as one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from softmeet.errors import InvalidInputError
from softmeet.hf.calibrated import resolved
from softmeet.hf.recorder import Recorder
from softmeet.hf.sampling import RowSampler
from softmeet.rules.gates import Unsure, parse_gate, that_closes
from softmeet.rules.settings import Settings

if TYPE_CHECKING:
    from softmeet.hf.modeling import EnsembleForCausalLM

# For each sequence or prompt, each member's own token ids before it; None for the member's default prefix.
Prefixes = Sequence[Sequence[Sequence[int] | None]]


@dataclass(frozen=True, eq=False)
class CallOptions:
    """softmeet's own options of one call of ``generate``, or of a ``forward`` outside of it.

    ``generate`` makes the object once, and transformers' loop passes it to every ``forward``.

    Attributes:
        settings: the settings by which the members are combined; a gate ``movement`` of theirs is calibrated.
        recorder: counts the solution of every position whose logits are kept; None for no record.
        row_sampler: draws each sequence's tokens from a generator of its own; None to let transformers draw them.
        prefixes: over bytes, for each sequence (or each prompt, if every prompt has the same number of sequences), the
            token ids that each member reads before it; None for the members' default prefixes.
    """

    settings: Settings
    recorder: Recorder | None = None
    row_sampler: RowSampler | None = None
    prefixes: Prefixes | None = None

    @classmethod
    def of(cls, model: EnsembleForCausalLM, given: dict[str, Any]) -> CallOptions:
        """Remove softmeet's own options from a call's keyword arguments, and return them, checked.

        Args:
            model: the ensemble that is called.
            given: the keyword arguments. Removed are ``settings``, ``recorder``, ``row_sampler``, ``prefixes``,
                ``weights`` and ``gate``. Without ``settings`` the model's own hold, with the pool's ``weights`` and the
                ``gate`` (a text such as ``"unsure:0.5"``, ``"none"`` for none) replaced by those given.

        Raises:
            InvalidInputError: if the weights or the gate are not valid, or prefixes are given over tokens.
            UnsupportedHeadError: if the ensemble is over bytes, and the rule reads heads.
        """
        settings, weights, gate = (given.pop(name, None) for name in ("settings", "weights", "gate"))
        if settings is None:
            settings = model.settings if weights is None else model.settings.changed(weights=weights)
            settings = settings if gate is None else settings.model_copy(update={"gate": parse_gate(gate)})
        model.require(settings)
        own = {name: given.pop(name, None) for name in ("recorder", "row_sampler", "prefixes")}
        if own["prefixes"] is not None and not model.over_bytes:
            raise InvalidInputError("expected no prefixes over tokens, where members share every token of a prompt")
        return cls(resolved(model, settings), **own)

    @cached_property
    def unsure(self) -> Unsure | None:
        """The gate ``unsure``, under which members after the first need not run; None for another gate or none."""
        gate = that_closes(self.settings.gate)
        return gate if isinstance(gate, Unsure) else None
