"""``EnsembleConfig``: the configuration of an ensemble, with its members' names and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedConfig, PreTrainedModel

from softmeet.errors import InvalidInputError
from softmeet.members.files import Files
from softmeet.members.member import Member
from softmeet.members.registered import refuse_servers
from softmeet.rules.registry import rule_names, source_of
from softmeet.rules.settings import GONE, Settings, parse_rule

# Options of single rules that checkpoints before version 0.2 hold even if their rule has no such option.
_OF_RULES = ("metric", "slack", "vertex")
# The classes of ensembles by their vocabulary; any other is EnsembleForCausalLM.
_CLASSES = {"bytes": "ByteEnsembleForCausalLM", "union": "UnionEnsembleForCausalLM"}


class _Held(BaseModel):
    """What a saved file holds beside settings, which are checked where they are set."""

    model_config = ConfigDict(strict=True)

    members: list[str] = []
    vocabulary: str = ""
    prefixes: list[list[int] | None] | None = None
    files: list[str] = []


class EnsembleConfig(PreTrainedConfig):
    """The configuration of an ensemble: its members' names, and the settings by which they are combined.

    Every field of :class:`softmeet.Settings` and every option of the rule is an argument and an attribute, too; an
    attribute that is set is checked at once. As attributes and in JSON, rules and gates are text such as
    ``"unsure:0.5"``; in JSON an infinite trust is ``"inf"``. ``rule_temperature`` applies to the rule's answer, and
    the temperature of ``generate`` to the result. ``gate`` applies in ``forward`` and ``generate``.

    Args:
        members: the members, in order, in any of the forms of :meth:`softmeet.Member.of`.
        rule: the rule, as text such as ``"meet:trust=0.3"`` or as an instance; None for the default, ``meet``.
        settings: all settings as one object, in place of ``rule`` and of settings by name; None to take those.
        given: settings and options of the rule by name; all others go to transformers' ``PreTrainedConfig``.

    Attributes:
        members: the members, in order, each as a line of text (:class:`softmeet.Member`).
        settings: all settings as one immutable object, completed for these members by :meth:`Settings.for_members`;
            setting an attribute replaces it.
        rule_source: the rule's origin, as ``"package NAME"`` or ``"class NAME"``; None for softmeet's own rules.
        vocabulary: ``"tokens"`` for members combined over their common tokens, ``"bytes"`` over bytes, ``"union"``, or
            a form of it, over the union of their tokens; ``"auto"`` until the tokenizers have been compared.
        prune: over bytes, the share of the probability mass of all tokenizations of a text from which on a member's
            model is run on a tokenization; those of less mass are estimated. 0 to estimate none.
        prefixes: over bytes, for each member the token ids that it reads before every text, None for those that its
            tokenizer puts there; None for these for all members.
        files: the user's files (:class:`softmeet.Files`) and readers that claim, each as a line of text.

    Raises:
        InvalidInputError: if a setting is not valid, there are not as many weights, trusts or prefixes as members, or
            the rule of a saved ensemble is not registered here; no member is loaded for the check.
    """

    model_type = "softmeet"

    def __init__(
        self,
        members: Sequence[Member | str] = (),
        rule: Any = None,
        *,
        settings: Settings | None = None,
        rule_source: str | None = None,
        vocabulary: str = "auto",
        prune: float = 0.01,
        prefixes: Sequence[Sequence[int] | None] | None = None,
        files: Sequence[Files | str] = (),
        **given: Any,
    ) -> None:
        if settings is None:
            _require_rule(rule, rule_source)
            own = {name: given.pop(name) for name in (*_names_of(rule), *_OF_RULES, *GONE) if name in given}
            settings = Settings.of({"rule": rule, **own})
        self.members, self.vocabulary, self.prune = [str(Member.of(one)) for one in members], vocabulary, prune
        self.settings = settings.for_members(len(self.members))
        if prefixes is not None and not (isinstance(prefixes, list | tuple) and len(prefixes) == len(self.members)):
            raise InvalidInputError(f"expected {len(self.members)} prefixes, one per member, got {prefixes!r:.200}")
        self.prefixes = None if prefixes is None else [None if own is None else list(own) for own in prefixes]
        self.files = list(map(str, files))
        given.pop("movement", None)  # what ensembles that were saved before 0.3.0 knew of a gate that is gone
        self.rule_source = source_of(self.settings.rule)
        # By the architecture transformers chooses the model's class, even without a checkpoint.
        given.setdefault("architectures", [_CLASSES.get(vocabulary.partition(":")[0], "EnsembleForCausalLM")])
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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration that a saved file holds; no prompt in it may be a file's path, no member a server's.

        Raises:
            InvalidInputError: if one is, or the file is damaged.
        """
        try:
            _Held.model_validate(config_dict)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InvalidInputError(f"config.json of a saved ensemble is damaged: {where}: {first['msg']}") from error
        refuse_servers(Member.parse(one, files=False) for one in config_dict.get("members", ()))
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise InvalidInputError(f"config.json of a saved ensemble is damaged: {error}") from error

    def adopt_limits(self, members: Sequence[PreTrainedModel], v: int, prefixes: Sequence[Sequence[int]] = ()) -> None:
        """Set, in this configuration, the limits and special ids that follow from the members' models, over tokens.

        ``vocab_size`` becomes v, ``max_position_embeddings`` the shortest context
        (None if no member has a limit); the ids that begin, end and pad a text (``bos_token_id``, ``eos_token_id``,
        ``pad_token_id``) are the first member's.

        Args:
            members: the loaded models, at least one, in the order of the members' names.
            v: the number of logits of the largest head.
            prefixes: for each member the ids of what it reads before every text, which takes room in its context; empty
                for nothing.
        """
        configs = [member.config.get_text_config(decoder=True) for member in members]
        self.vocab_size = v
        limits = [getattr(own, "max_position_embeddings", None) for own in configs]
        taken = [len(own) for own in prefixes] or [0] * len(limits)
        left = [limit - own for limit, own in zip(limits, taken, strict=True) if limit is not None]
        self.max_position_embeddings = min(left, default=None)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, key, getattr(configs[0], key, None))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dict of JSON values, with an entry for each setting by name.

        The rule with its options is one text, as is the gate.
        """
        found: dict[str, Any] = super().to_dict()
        if isinstance(found.pop("settings", None), Settings):
            found |= self.settings.plain()
        if found.get("rule_source") is None:
            found.pop("rule_source", None)
        return found


def _is_option(name: str, settings: Settings) -> bool:
    """Return whether ``name`` is the name of a setting, or of an option of the settings' rule."""
    return name in Settings.model_fields or name in type(settings.rule).model_fields


def _names_of(rule: Any) -> tuple[str, ...]:
    """Return the names of all settings but the rule, and of the rule's options; ``rule`` is its text or instance."""
    kind = type(parse_rule(rule)[0] if isinstance(rule, str) else rule)
    return (*(name for name in Settings.model_fields if name != "rule"), *getattr(kind, "model_fields", ()))


def _require_rule(rule: Any, source: str | None) -> None:
    """Raise InvalidInputError, with advice, if a rule from elsewhere is not registered here."""
    name = rule.partition(":")[0] if isinstance(rule, str) else None
    if source is not None and name is not None and name not in rule_names():
        kind, _, origin = source.partition(" ")
        advice = (
            f"pip install {origin}" if kind == "package" else f"softmeet.register_rule({origin}), then load it again"
        )
        raise InvalidInputError(
            f"the rule {name!r} of this ensemble comes from the {source}, which is not here: {advice}"
        )
