"""The settings by which members are combined, in one object that is checked once.

``combine`` takes its fields as arguments, a configuration saves them, the commands have a flag for each, the server
lets requests change some, and evaluation tries several values. A new setting is a field here; a new option of one rule
is a field of that rule. A rule's text may hold both, in the same form, with slashes in lists:
``meet:budget=3:trust=1/0/0.3:pool=prob-mean``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from softmeet.errors import InvalidInputError
from softmeet.rules.base import Rule
from softmeet.rules.by_member import checked_trust, checked_weights
from softmeet.rules.frozen import Frozen, takes, unknown
from softmeet.rules.registry import DEFAULT, all_rules, require_own_name, rule_class

Pool = Literal["logit-mean", "prob-mean"]
OnInfeasible = Literal["meet", "raise"]
POOLS: tuple[Pool, ...] = get_args(Pool)
# Small enough to cost little if members err beyond their narrow heads; `softmeet fit` chooses better ones from text.
DEFAULT_TRUST = 0.3
# A colon between options, unlike the one inside gate=unsure:0.5.
_COLON = re.compile(r":(?![\d.])")
# Short names that a rule's text may use for fields.
SHORT = {"temperature": "rule_temperature"}


def _numbers(value: Any) -> Any:
    """Convert a number, or a list, array or tensor of numbers on any device, to a float or a tuple of floats."""
    if value is None:
        return None
    import numpy as np  # late, so that `--help` does not wait for it

    value = value.detach().cpu().numpy() if hasattr(value, "detach") else value
    try:
        array = np.asarray(value, dtype=np.float64)
    except OverflowError:
        raise InvalidInputError("to be numbers that a float can hold, got an integer that is larger") from None
    except (TypeError, ValueError):
        raise InvalidInputError(f"to be a number or a list of numbers, got {value!r}") from None
    if array.ndim > 1:
        raise InvalidInputError(f"to be a number or a list of numbers, got an array of shape {array.shape}")
    # A single number in an array serves every member, as a bare one does; in a list it is the list of one member.
    bare = array.ndim == 0 or (array.size == 1 and not isinstance(value, list | tuple))
    return float(array.reshape(-1)[0]) if bare else tuple(array.tolist())


def _count(value: Any) -> Any:
    """Convert an integer of any type, or its text, to an int of at least 1; return None for None."""
    if value is None:
        return None
    try:
        found = 0 if isinstance(value, bool) else operator.index(int(value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        found = 0
    if found < 1:
        raise InvalidInputError(f"to be an integer of at least 1, got {value!r}")
    return found


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


def _trusts(value: Any) -> Any:
    found = _numbers(value)
    if not all(rho >= 0 for rho in ([found] if isinstance(found, float) else found)):
        raise InvalidInputError(f"expected trusts from 0 to inf, got {found}")
    return found


Count = Annotated[int, BeforeValidator(_count)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(Frozen):
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

    rule: Annotated[Rule, BeforeValidator(_rule)] = Field(
        default=DEFAULT,
        validate_default=True,
        description="How the members are combined: the name of a rule. Options follow it after colons, as in "
        "meet:trust=1/0.3:pool=prob-mean, with slashes between the numbers of several members; an option "
        "is given here or by its own flag, not by both.",
    )
    trust: Annotated[float | tuple[float, ...], BeforeValidator(_trusts)] = Field(
        default=DEFAULT_TRUST,
        description="How far meet may move the average towards the members, one number or one for each with commas "
        "between: 0 is not at all; inf is full agreement, within tol: the mean of the rows of each "
        "member's head (output layer) is then the same as under its own prediction.",
    )
    weights: Annotated[tuple[float, ...] | float | None, BeforeValidator(_numbers)] = Field(
        default=None,
        description="The members' weights in the average, with commas between them; they have to sum to 1. By default "
        "they are equal. For the rule logit-mean they may be below 0, as in 1.5,-0.5.",
    )
    pool: Pool = Field(
        default="logit-mean",
        description="The average that a rule starts from: logit-mean (of logits) or prob-mean (of probabilities).",
    )
    tol: Positive = Field(
        default=1e-3,
        description="How far the computed distribution may be from the rule's exact one, in nats of KL divergence.",
    )
    max_steps: Count = Field(
        default=50,
        description="The most steps of the solver. Where more are needed, the best distribution found is used, and "
        "counted as NOT_CONVERGED in the output.",
    )
    on_infeasible: OnInfeasible = Field(
        default="meet",
        description="For rules that need exact agreement, such as max-entropy: where no distribution agrees with all "
        "members, meet uses the rule meet, and raise stops with an error.",
    )
    free_weights: bool = Field(default=False, description="Do not require that weights sum to 1.")
    rank: Annotated[int | None, BeforeValidator(_count)] = Field(
        default=None,
        description="Use only the N strongest principal directions of each head (output layer). All by default.",
    )
    free_radial: bool = Field(
        default=False,
        description="The norm before a head fixes the length (LayerNorm: also the mean) of the hidden state. Do not "
        "make members agree along the directions in which only these would change.",
    )
    rule_temperature: Positive = Field(
        default=1.0,
        description="The temperature T of the combined distribution, p^(1/T) normalised; temperature in a rule's text.",
    )
    bands: Count = Field(default=1, description="Bands into which each head's directions are cut, each with a trust.")
    gate: Annotated[Any, BeforeValidator(_gate)] = Field(
        default=None,
        description="For which tokens not to compute the rule. movement:T, for meet with finite trusts alone, uses "
        "the average where meet is predicted to move it by less than T nats (KL divergence). disagreement:T uses the "
        "average where its KL divergences to the members, each times the member's trust (0.3 where that is inf), add "
        "up to at most T nats. unsure:T uses the first member alone, without running the others, where it gives a "
        "token at least the probability T. none always computes; auto is movement:0.003, or none where movement does "
        "not apply.",
    )

    @model_validator(mode="after")
    def _signs_fit(self) -> Settings:
        """Refuse weights below 0 where the rule, the pool or the gate has no meaning for them."""
        if isinstance(self.weights, tuple) and min(self.weights, default=0.0) < 0:
            _require_signed(self, self.weights)
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
        return found if self.weights is None else found.for_members(len(self.weights))  # type: ignore[arg-type]

    def plain(self) -> dict[str, Any]:
        """Return every setting by name in the types of JSON: rules and gates as text, tuples as lists, inf as "inf"."""
        return {name: _plain(value) for name, value in self}

    def for_members(self, n: int) -> Settings:
        """Return a copy for n members, with n weights and n · ``bands`` trusts: member by member, then band by band.

        Bands are groups of a head's principal directions that have trusts of their own. Weights of None become 1/n.
        ``trust`` may be a number (not a list of one), which serves all members; n numbers, each of which serves all
        bands of its member; or n · ``bands`` numbers.

        Raises:
            InvalidInputError: if the number of weights or trusts does not fit; or a weight is not finite, none is
                positive, they sum to 0, or, without ``free_weights``, they do not sum to 1 within 10⁻⁶.
        """
        weights = checked_weights(self.weights, n, free=self.free_weights)
        return self.model_copy(update={"weights": weights, "trust": checked_trust(self.trust, n, self.bands)})

    def ungated(self) -> Settings:
        """Return a copy without a gate, so that the rule is solved in every row."""
        return self if self.gate is None else self.model_copy(update={"gate": None})

    @property
    def member_trust(self) -> tuple[float, ...]:
        """The n · ``bands`` trusts, in nats per nat: member by member, then band by band.

        These settings must be from :meth:`for_members`, which is not checked.
        """
        return self.trust  # type: ignore[return-value]

    @property
    def member_weights(self) -> tuple[float, ...]:
        """The n weights; these settings must be from :meth:`for_members`, which is not checked."""
        return self.weights  # type: ignore[return-value]

    def trusts(self) -> list[list[float]]:
        """Return, for each member, the list of its bands' trusts in nats per nat.

        These settings must be from :meth:`for_members`, which is not checked.
        """
        return [list(self.member_trust[i : i + self.bands]) for i in range(0, len(self.member_trust), self.bands)]

    def for_bands(self) -> Settings:
        """Return the settings of an ensemble in which each band, a group of a head's directions, is a member itself.

        It has n · ``bands`` members, member by member, each with its band's trust, and ``bands`` 1. The first band of
        each member has the member's weight in the pool, the others 0. These settings must be from :meth:`for_members`.
        """
        weights = [w for own in self.member_weights for w in (own, *[0.0] * (self.bands - 1))]
        return self.model_copy(update={"weights": tuple(weights), "bands": 1})

    def relaxed(self) -> Settings:
        """Return a copy of settings of :meth:`for_members` with infinite trusts replaced by 0.3, for the fallback."""
        trust = tuple([DEFAULT_TRUST if math.isinf(rho) else rho for rho in self.member_trust])
        return self.model_copy(update={"trust": trust})


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
    """Parse a number, or several with slashes between them, into a float or a tuple of floats."""
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


def _require_signed(settings: Settings, weights: tuple[float, ...]) -> None:
    """Check that settings with a weight below 0 have a rule, a pool and a gate that such weights make sense for."""
    rule, gate = settings.rule, settings.gate
    if not rule.takes_signed_weights:
        others = " or ".join(one.name for one in all_rules() if one.takes_signed_weights)
        raise InvalidInputError(
            f"the rule {rule.name} takes no weight below 0, got {list(weights)}: use the rule {others}, or weights of "
            "at least 0"
        )
    if settings.pool == "prob-mean":
        raise InvalidInputError(
            f"the pool prob-mean takes no weight below 0, got {list(weights)}: use the pool logit-mean"
        )
    if gate is not None and gate.first_alone and weights[0] < 0:
        raise InvalidInputError(
            f"the gate {gate} lets the first member answer alone, and its weight is {weights[0]:g}: put a member of "
            "positive weight first, or say gate none"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return "inf" if math.isinf(value) else value
    return value if value is None or isinstance(value, bool | int | str) else str(value)
