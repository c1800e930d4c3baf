"""What a call of an ensemble asks for beyond what transformers knows, as one object."""

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

# For each row, each member's tokens before it; None for those before every text.
Prefixes = Sequence[Sequence[Sequence[int] | None]]


@dataclass(frozen=True, eq=False)
class CallOptions:
    """What one call of ``generate``, or of ``forward`` alone, asks of an ensemble.

    ``generate`` makes it once, and transformers' loop hands it to every ``forward`` as it is.

    Attributes:
        settings: how to combine the members; a gate of theirs is calibrated.
        recorder: receives the solution of every position whose logits are kept; None for nobody.
        row_sampler: draws each row's tokens by a generator of its own; None to leave that to transformers.
        prefixes: over bytes, each member's own tokens before each row; None for those before every text.
    """

    settings: Settings
    recorder: Recorder | None = None
    row_sampler: RowSampler | None = None
    prefixes: Prefixes | None = None

    @classmethod
    def of(cls, model: EnsembleForCausalLM, given: dict[str, Any]) -> CallOptions:
        """Take what is softmeet's own out of a call's keyword arguments.

        Args:
            model: that is called.
            given: the arguments. Those that are an attribute of this class are removed, and so are ``weights`` of the
                pool and ``gate`` (``"none"`` for none), which change the model's own settings where none are given.

        Raises:
            InvalidInputError: wrong weights, no such gate, or prefixes over tokens.
            UnsupportedHeadError: over bytes, the rule reads heads.
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
        """The gate by which members need not run, if there is one that can close."""
        gate = that_closes(self.settings.gate)
        return gate if isinstance(gate, Unsure) else None
