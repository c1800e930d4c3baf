"""The settings by which members are combined, in one object that is checked once.

``combine`` takes its fields as arguments, a configuration saves them, the commands have a flag for each, the server
lets requests change some, and evaluation tries several values. A new setting is a field in ``rules/values.py``; a new
option of one rule is a field of that rule. A rule's text may hold both, in the same form, with slashes in lists:
``meet:budget=3:trust=1/0/0.3:pool=prob-mean``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from softmeet.errors import InvalidInputError
from softmeet.rules.base import Rule
from softmeet.rules.frozen import takes, unknown
from softmeet.rules.registry import DEFAULT, all_rules, require_own_name, rule_class
from softmeet.rules.values import BY_SIZE, SHORT, SettingValues

# Settings of versions before 0.3.0, with the values of saved ensembles in which they change nothing.
GONE = {"rank": None, "bands": 1, "free_radial": False}
# A colon between options, unlike the one inside gate=unsure:0.5.
_COLON = re.compile(r":(?![\d.])")


def _rule(value: Any) -> Any:
    if isinstance(value, str):
        return rule_of(value)
    if not isinstance(value, Rule):
        raise InvalidInputError(f"expected a rule's name, or an instance of softmeet.Rule, got {value!r}")
    require_own_name(value)
    return value


def _gate(value: Any) -> Any:
    from softmeet.rules.gates import parse_gate

    return parse_gate(value)


class Settings(SettingValues):
    """All settings by which n members are combined; every field is an argument of :func:`softmeet.combine`.

    An instance never changes. It is made by :meth:`of`, or by ``Settings(**fields)``, which takes no options of a rule;
    of fields that are not given the defaults are used. Before :meth:`for_members`, ``weights`` may be None and
    ``trust`` one number; afterwards both are tuples, as a :class:`~softmeet.rules.problem.Problem` needs them.

    Raises:
        InvalidInputError: if a field is unknown or its value is not allowed.

    Example:
        >>> from softmeet.rules.settings import Settings
        >>> settings = Settings.of({"rule": "meet:trust=1/0", "pool": "prob-mean"}).for_members(2)
        >>> settings.trust, settings.weights, settings.pool
        ((1.0, 0.0), (0.5, 0.5), 'prob-mean')
    """

    rule: Annotated[Rule, BeforeValidator(_rule)] = Field(default=DEFAULT, validate_default=True)
    """How the models are mixed (softmeet methods lists the ways). Options follow the name after colons, as in
    meet:trust=1/0.3:pool=prob-mean, with slashes between the numbers of several members; an option is given here or
    by its own flag, not by both.
    """
    gate: Annotated[Any, BeforeValidator(_gate)] = None
    """For which tokens not to compute the rule. disagreement:T uses the average where its KL divergences to members,
    each times the member's trust (0.3 where that is inf), add up to at most T nats.
    unsure:T uses the first member alone, without running the others, where it gives a token at least the probability T.
    safe:T uses it where members agree, where they give its favourite more than T on average, and, over a union of
    tokens, where one of them would write a token across the place.
    none always computes; auto is disagreement:0.08 for meet with finite trusts, else none.
    """

    @model_validator(mode="after")
    def _signs_fit(self) -> Settings:
        """Refuse weights below 0 where the rule, the pool or the gate has no meaning for them."""
        weights, rule, gate = self.weights, self.rule, self.gate
        if not (isinstance(weights, tuple) and min(weights, default=0.0) < 0):
            return self
        if not rule.takes_signed_weights:
            others = " or ".join(one.name for one in all_rules() if one.takes_signed_weights)
            raise InvalidInputError(
                f"the rule {rule.name} takes no weight below 0, got {list(weights)}: use the rule {others}, or weights "
                "of at least 0"
            )
        if self.pool == "prob-mean":
            raise InvalidInputError(
                f"the pool prob-mean takes no weight below 0, got {list(weights)}: use the pool logit-mean"
            )
        if gate is not None and gate.first_alone and weights[0] < 0:
            raise InvalidInputError(
                f"the gate {gate} lets the first member answer alone, and its weight is {weights[0]:g}: put a member "
                "of positive weight first, or say gate none"
            )
        return self

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Build settings from keyword arguments of mixed kinds, as ``combine`` gets them.

        Args:
            given: fields of this class and options of the rule, by name; None stands for a default. ``rule`` may be an
                instance or a text, which may hold options and settings itself: ``"meet:trust=1/0.3"``. An option that
                only another known rule has is checked, and then ignored.

        Raises:
            InvalidInputError: if a name or value is wrong, or given both in the rule's text and by name.
            RuleError: if the rule comes from a package that fails to provide it.
        """
        return cls(**_resolved(given, None))

    def changed(self, **changes: Any) -> Settings:
        """Return a copy with some settings, or options of the rule, changed, for the same number of members.

        If these settings have weights, they and the trusts are checked again by :meth:`for_members`.

        Args:
            changes: new values by name, as :meth:`of` takes them; None stands for a setting's default, but keeps the
                rule or its option. A new ``rule`` keeps no option of the old rule.

        Raises:
            InvalidInputError, RuleError: as by :meth:`of`; InvalidInputError also as by :meth:`for_members`.
        """
        if not changes:
            return self
        found = Settings(**{**dict(self), **_resolved(changes, self.rule)})
        is_for_some = isinstance(self.weights, tuple) and found.weights != BY_SIZE
        return found.for_members(len(self.weights)) if is_for_some else found  # type: ignore[arg-type]


def rule_of(text: str) -> Rule:
    """Parse a rule's text that holds options of the rule but no settings, such as ``least-squares:metric=raw``.

    Raises:
        InvalidInputError: if there is no such rule or option, a value is not allowed, or the text holds a setting.
        RuleError: if the rule comes from a package that fails to provide it.
    """
    rule, settings = parse_rule(text)
    if settings:
        raise InvalidInputError(f"expected a rule with its own options alone, got {next(iter(settings))} in {text!r}")
    return rule


def parse_rule(text: str) -> tuple[Rule, dict[str, Any]]:
    """Parse a rule's text, ``NAME:option=value:option=value`` with slashes in lists, into the rule and settings.

    Returns:
        (the rule, made with those options that are its own; the other options, which are settings of
        :class:`Settings`, checked, by name).

    Raises:
        InvalidInputError: if there is no such rule or option, an option occurs twice, or a value is not allowed.
        RuleError: if the rule comes from a package that fails to provide it.

    Example:
        >>> from softmeet.rules.settings import parse_rule
        >>> rule, settings = parse_rule("meet:budget=3:trust=1/0.5:temperature=0.9")
        >>> str(rule), settings
        ('meet:budget=3', {'trust': (1.0, 0.5), 'rule_temperature': 0.9})
    """
    name, *options = _COLON.split(text.strip())
    kind = rule_class(name)
    own: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        key = SHORT.get(key, key)
        if not equals or not value or key == "rule":
            raise InvalidInputError(f"expected option=value after the colon in {text!r}, got {option!r}")
        if key in own or key in settings:
            raise InvalidInputError(f"expected each option once, got {key} twice in {text!r}")
        if key in kind.model_fields:
            own[key] = _listed(value, text) if takes(kind.model_fields[key], tuple) else value
        elif key in Settings.model_fields:
            settings[key] = _listed(value, text) if takes(Settings.model_fields[key], tuple) else value
        elif key in GONE:
            raise _gone(key)
        else:
            shared = [name for name in (*SHORT, *Settings.model_fields) if name not in ("rule", *SHORT.values())]
            raise unknown(f"unknown option {key!r} in {text!r}", key, [*kind.model_fields, *shared])
    try:
        rule = kind(**own)
        checked = Settings(rule=rule, **settings) if settings else None
        return rule, {key: getattr(checked, key) for key in settings} if checked else {}
    except InvalidInputError as error:
        raise InvalidInputError(f"in {text!r}: {error}") from error


def _listed(value: str, text: str) -> Any:
    """Parse a number, or several with slashes between them, into a float or a tuple of floats; ``auto`` stays."""
    if value == BY_SIZE:
        return value
    try:
        numbers = tuple(float(part) for part in value.split("/"))
    except ValueError:
        raise InvalidInputError(f"expected NUMBER or NUMBER/NUMBER in {text!r}, got {value!r}") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _resolved(given: Mapping[str, Any], before: Rule | None) -> dict[str, Any]:
    """Return the fields of :class:`Settings`, by name, that keyword arguments of mixed kinds amount to.

    Args:
        given: settings, options of a rule, and ``rule``, an instance or a text; None stands for a default.
        before: the rule to which options apply if ``given`` has no rule; None for the default rule.
    """
    fields, named = Settings.model_fields, {key: value for key, value in given.items() if value is not None}
    for key in GONE.keys() & named.keys():
        if named.pop(key) != GONE[key]:
            raise _gone(key)
    reset = {key: fields[key].get_default() for key in given.keys() - named.keys() if key in fields}
    rule, settings = named.pop("rule", before), dict[str, Any]()
    if isinstance(rule, str):
        text = rule
        rule, settings = parse_rule(text)
        if both := sorted((settings.keys() | rule.own_options().keys()) & named.keys()):
            raise InvalidInputError(
                f"{both[0]} is named twice, in the rule {text!r} and as {both[0]}={named[both[0]]!r}: leave one out"
            )
    if own := {key: value for key, value in named.items() if key not in Settings.model_fields}:
        rule = _with_options(_rule(rule or DEFAULT), own)
    named = {key: value for key, value in named.items() if key in fields}
    return {**reset, **named, **settings} | ({} if rule is None else {"rule": rule})


def _gone(key: str) -> InvalidInputError:
    return InvalidInputError(
        f"expected settings of today, got {key}, which is none since 0.3.0: leave it out, or lower trust"
    )


def _with_options(rule: Rule, own: Mapping[str, Any]) -> Rule:
    """Return a copy of a rule with some options changed; options of other rules are checked, then ignored."""
    kind = type(rule)
    for name in own.keys() - kind.model_fields.keys():
        owners = [type(other) for other in all_rules() if name in type(other).model_fields]
        if not owners:
            known = [*kind.model_fields, *Settings.model_fields]
            raise unknown(f"neither an ensemble nor the rule {rule.name} has an option {name!r}", name, known)
        owners[0](**{name: own[name]})
    mine = {name: value for name, value in own.items() if name in kind.model_fields}
    return kind(**{**rule.own_options(), **mine})
