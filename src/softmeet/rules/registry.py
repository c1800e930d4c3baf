"""The registry of rules by name: softmeet's own, rules of installed packages, and rules registered in this process.

A package makes a rule known by an entry point of the group ``softmeet.rules``; a rule is imported when it is first
used. If a name occurs more than once, softmeet's own rule has it, else the package's, else the one registered in this
process.
"""

from __future__ import annotations

import inspect
import re
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points, packages_distributions
from typing import TypeVar

from softmeet.errors import InvalidInputError, RuleError
from softmeet.rules.base import Rule
from softmeet.rules.frozen import unknown
from softmeet.rules.values import SHORT, SettingValues

GROUP = "softmeet.rules"
# In the order in which they are documented. A new rule is one file and one line here.
_OWN = {
    "meet": "softmeet.rules.meet:Meet",
    "max-entropy": "softmeet.essay.max_entropy:MaxEntropy",
    "least-squares": "softmeet.essay.least_squares:LeastSquares",
    "min-cross-entropy": "softmeet.essay.min_cross_entropy:MinCrossEntropy",
    "min-squared-cross-entropy": "softmeet.essay.min_squared_cross_entropy:MinSquaredCrossEntropy",
    "min-underestimation": "softmeet.essay.min_underestimation:MinUnderestimation",
    "min-reverse-cross-entropy": "softmeet.essay.min_reverse_cross_entropy:MinReverseCrossEntropy",
    "logit-mean": "softmeet.rules.pools:LogitMean",
    "prob-mean": "softmeet.rules.pools:ProbMean",
    "power-mean": "softmeet.rules.pools:PowerMean",
    "one-hot": "softmeet.rules.pools:OneHot",
    "pointwise-max": "softmeet.rules.pointwise:PointwiseMax",
    "pointwise-min": "softmeet.rules.pointwise:PointwiseMin",
    "drop": "softmeet.rules.pointwise:Drop",
    "core": "softmeet.rules.pointwise:Core",
}
DEFAULT = "meet"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# Names of settings, which no option of a rule may have.
_RESERVED = {*SettingValues.model_fields, *SHORT, "prompt_weights"}
_registered: dict[str, type[Rule]] = {}

R = TypeVar("R", bound=type[Rule])


def register_rule(rule: R) -> R:
    """Register a rule under its name for this process, so that texts such as ``--rule NAME`` find it.

    Usable as a decorator. A class that is defined again, as in a notebook's cell, replaces the earlier one.

    Args:
        rule: a subclass of :class:`Rule` with ``solve``, a ``name``, a ``summary`` and a default for each option, none
            of which is named as a setting of all rules (:class:`softmeet.Settings`).

    Returns:
        ``rule`` itself.

    Raises:
        InvalidInputError: if ``rule`` is not such a class, or another class has its name: a rule of softmeet, of a
            package, or one registered before from another module or under another class name.

    Example:
        >>> import softmeet
        >>> @softmeet.register_rule
        ... class First(softmeet.Rule):
        ...     \"\"\"p = p̂_1.\"\"\"
        ...     name = "first-member"
        ...     summary = "the first member alone"
        ...     def solve(self, problem):
        ...         return problem.restricted(problem.log_p[0])
        >>> "first-member" in softmeet.rule_names()
        True
    """
    require_rule(rule, "register_rule")
    known = _registered.get(rule.name)
    if rule.name in _installed() or (known is not None and _place(known) != _place(rule)):
        raise InvalidInputError(f"the name {rule.name!r} is taken: there is such a rule; give yours another name")
    _registered[rule.name] = rule
    return rule


def rule_names() -> list[str]:
    """Return the names of all known rules, without importing any.

    softmeet's own come first, then those of installed packages, then those registered in this process.

    Example:
        >>> import softmeet
        >>> softmeet.rule_names()[:2]
        ['meet', 'max-entropy']
    """
    return [*_installed(), *(name for name in _registered if name not in _installed())]


def rule_class(name: str) -> type[Rule]:
    """Return the class of the rule with the name ``name``, importing it if necessary.

    Raises:
        InvalidInputError: if there is no rule of that name; the message suggests the nearest name.
        RuleError: if the package that announces the rule fails to provide it.
    """
    if name in _installed():
        return _loaded(_installed()[name])
    if name in _registered:
        return _registered[name]
    raise unknown(f"unknown rule {name!r}", name, rule_names())


def all_rules() -> tuple[Rule, ...]:
    """Return an instance of every known rule with its default options, in the order of :func:`rule_names`.

    A rule whose package fails to provide it is left out, with a warning.
    """
    found = []
    for name in rule_names():
        try:
            found.append(rule_class(name)())
        except RuleError as error:
            warnings.warn(str(error), stacklevel=2)
    return tuple(found)


def source_of(rule: Rule) -> str | None:
    """Return a rule's source: ``package NAME``, or ``class NAME`` if no package has it; None for softmeet's own rules.

    Saved ensembles keep it, for the error if the rule is unknown when they are loaded.
    """
    if rule.name in _OWN:
        return None
    entry = _installed().get(rule.name)
    if entry is not None and entry.dist is not None:
        return f"package {entry.dist.name}"
    packages = packages_distributions().get(type(rule).__module__.partition(".")[0])
    return f"package {packages[0]}" if packages else f"class {type(rule).__qualname__}"


def require_own_name(rule: Rule) -> None:
    """Check that a rule's name leads to the rule's own class, as configurations save rules by name.

    Raises:
        InvalidInputError: if another class has the name, or the rule's class fails :func:`require_rule`.
        RuleError: if the name belongs to a package that fails to provide its rule.
    """
    kind = type(rule)
    require_rule(kind, "rule=")
    if kind.name in rule_names() and _place(rule_class(kind.name)) != _place(kind):
        raise InvalidInputError(f"the name {kind.name!r} of {kind.__qualname__} is taken: give it another one")


@cache
def _installed() -> dict[str, EntryPoint]:
    found = {name: EntryPoint(name, target, GROUP) for name, target in _OWN.items()}
    for entry in entry_points(group=GROUP):
        if entry.name in found:
            warnings.warn(
                f"the rule {entry.name!r} of {_origin(entry)} is left out: {_origin(found[entry.name])} has that name; "
                "it needs another one",
                stacklevel=2,
            )
        else:
            found[entry.name] = entry
    return found


@cache
def _loaded(entry: EntryPoint) -> type[Rule]:
    where = f"the rule {entry.name!r} of {_origin(entry)}"
    try:
        rule: type[Rule] = entry.load()
        require_rule(rule, entry.value)
    except Exception as error:
        raise RuleError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if rule.name != entry.name:
        raise RuleError(f"{where} calls itself {rule.name!r}: expected one name in both places")
    return rule


def require_rule(rule: object, where: str) -> None:
    """Check that an object is a usable class of rules.

    Args:
        rule: the object to check.
        where: its source, for the message, such as ``register_rule``.

    Raises:
        InvalidInputError: if it is not a concrete subclass of :class:`Rule`, lacks a well-formed name or a summary, or
            has an option that is named as a setting of all rules or has no default.
    """
    if not (inspect.isclass(rule) and issubclass(rule, Rule)) or inspect.isabstract(rule):
        raise InvalidInputError(f"expected a subclass of softmeet.Rule with a method solve in {where}, got {rule!r}")
    name, summary = getattr(rule, "name", None), getattr(rule, "summary", None)
    if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(summary, str) and summary):
        raise InvalidInputError(
            f"expected {rule.__name__} to have a name of small letters, digits and hyphens, and a summary, got "
            f"name = {name!r}, summary = {summary!r}"
        )
    if shared := sorted(_RESERVED & rule.model_fields.keys()):
        raise InvalidInputError(f"the option {shared[0]!r} of the rule {name!r} is a setting of all: name it otherwise")
    if needy := [option for option, field in rule.model_fields.items() if field.is_required()]:
        raise InvalidInputError(f"expected a default for each option of the rule {name!r}, got none for {needy[0]}")


def _origin(entry: EntryPoint) -> str:
    owner = "softmeet itself" if entry.name in _OWN else f"the entry point {entry.value}"
    return owner if entry.dist is None else f"the package {entry.dist.name}"


def _place(rule: type[Rule]) -> tuple[str, str]:
    """Return a class's (module, qualified name); equal for a class that is defined again, as by a notebook's cell."""
    return rule.__module__, rule.__qualname__
