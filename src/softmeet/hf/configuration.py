"""The configuration of an ensemble: which members, and how they are combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.rules.registry import rule_names, source_of
from softmeet.rules.settings import Settings, parse_rule

# Options of single rules that checkpoints before 0.2 hold for every rule.
_OF_RULES = ("metric", "slack", "vertex")


class EnsembleConfig(PreTrainedConfig):
    """Members, and how they are combined: the fields of :class:`softmeet.Settings` and the rule's options.

    An attribute that is set is checked at once. As attributes, and in JSON, rules and gates are text, and an infinite
    trust is ``"inf"``. ``rule_temperature`` is of the rule's answer; that of generation comes on top. ``gate`` is of
    forward and generate: where members are not asked or the rule not solved (``softmeet.rules.gates``).

    Attributes:
        members: their names, in order.
        settings: all that decides how they are combined; it never changes in itself.
        rule_source: what brings the rule, if it is not softmeet's own.
        vocabulary: what the members are combined over, their common ``"tokens"`` or ``"bytes"``; ``"auto"``
            until that is known.
        prune: over bytes, the share of mass from which a tokenization of the text is followed; 0 for all of them.
        prefixes: over bytes, for each member its own tokens before every text; None for what its tokenizer puts there.
        movement: what the gate ``movement`` knows of these members, by the settings that it was found for
            (``hf/calibrated.py``).

    Raises:
        InvalidInputError: a setting is wrong; checked here, before any member is loaded or run.
    """

    model_type = "softmeet"

    def __init__(
        self,
        members: Sequence[str] = (),
        rule: Any = None,
        *,
        settings: Settings | None = None,
        rule_source: str | None = None,
        vocabulary: str = "auto",
        prune: float = 0.01,
        prefixes: Sequence[Sequence[int] | None] | None = None,
        movement: Mapping[str, float | None] | None = None,
        **given: Any,
    ) -> None:
        if settings is None:
            _require_rule(rule, rule_source)
            own = {name: given.pop(name) for name in (*_names_of(rule), *_OF_RULES) if name in given}
            settings = Settings.of({"rule": rule, **own})
        self.members, self.vocabulary, self.prune = [str(member) for member in members], vocabulary, prune
        self.settings = settings.for_members(len(self.members))
        if prefixes is not None and len(prefixes) != len(self.members):
            raise InvalidInputError(f"expected {len(self.members)} prefixes, one per member, got {len(prefixes)}")
        self.prefixes = None if prefixes is None else [None if own is None else list(own) for own in prefixes]
        self.movement = dict(movement or {})
        self.rule_source = source_of(self.settings.rule)
        # By it transformers chooses the class, where there are no weights to be loaded with it.
        given.setdefault(
            "architectures", ["ByteEnsembleForCausalLM" if vocabulary == "bytes" else "EnsembleForCausalLM"]
        )
        super().__init__(**given)

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings")
        if settings is None or not _is_option(name, settings):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        value = getattr(settings if name in Settings.model_fields else settings.rule, name)
        if name in ("rule", "gate"):
            return None if value is None else str(value)
        return list(value) if isinstance(value, tuple) else value

    def __setattr__(self, name: str, value: Any) -> None:
        settings = self.__dict__.get("settings")
        if settings is not None and _is_option(name, settings):
            self.settings = settings.changed(**{name: value})
        else:
            super().__setattr__(name, value)

    def adopt_limits(self, members: Sequence[PreTrainedModel]) -> None:
        """Note what follows from the members over tokens: their vocabulary's size, shortest context and special ids."""
        configs = [member.config.get_text_config(decoder=True) for member in members]
        self.vocab_size = max(member.get_output_embeddings().weight.shape[0] for member in members)
        limits = [getattr(own, "max_position_embeddings", None) for own in configs]
        self.max_position_embeddings = min((limit for limit in limits if limit is not None), default=None)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, key, getattr(configs[0], key, None))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        found: dict[str, Any] = super().to_dict()
        if isinstance(found.pop("settings", None), Settings):
            found |= self.settings.plain()
        # What could not be found in time on one machine may be on another.
        found["movement"] = {key: factor for key, factor in self.movement.items() if factor is not None}
        if found.get("rule_source") is None:
            found.pop("rule_source", None)
        return found


def _is_option(name: str, settings: Settings) -> bool:
    """Say whether a setting, or an option of the rule, goes by that name."""
    return name in Settings.model_fields or name in type(settings.rule).model_fields


def _names_of(rule: Any) -> tuple[str, ...]:
    """Return the names of all settings, and of the options of a rule that is named by text or given."""
    kind = type(parse_rule(rule)[0] if isinstance(rule, str) else rule)
    return (*(name for name in Settings.model_fields if name != "rule"), *getattr(kind, "model_fields", ()))


def _require_rule(rule: Any, source: str | None) -> None:
    name = rule.partition(":")[0] if isinstance(rule, str) else None
    if source is not None and name is not None and name not in rule_names():
        kind, _, origin = source.partition(" ")
        advice = (
            f"pip install {origin}" if kind == "package" else f"softmeet.register_rule({origin}), then load it again"
        )
        raise InvalidInputError(
            f"the rule {name!r} of this ensemble comes from the {source}, which is not here: {advice}"
        )
