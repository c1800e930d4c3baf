"""Which rules there are, by name: softmeet's own, those of installed packages, and those registered by hand.

A package makes a rule known by an entry point of the group ``softmeet.rules``, as softmeet does with its own; nothing
is imported before it is asked for. A name belongs to the first that has it: softmeet's own before packages, packages
before what is registered by hand.
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
    "one-hot": "softmeet.rules.pools:OneHot",
}
DEFAULT = "meet"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_registered: dict[str, type[Rule]] = {}

R = TypeVar("R", bound=type[Rule])


def register_rule(rule: R) -> R:
    """Make a rule known by its name, in this process; usable as a decorator.

    Args:
        rule: a subclass of :class:`Rule` with a name, a summary and a default for each option.

    Returns:
        The rule itself.

    Raises:
        InvalidInputError: it is no such class, or its name is taken.

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
    """List the names of all rules, without importing any of them.

    Example:
        >>> import softmeet
        >>> softmeet.rule_names()[:2]
        ['meet', 'max-entropy']
    """
    return [*_installed(), *(name for name in _registered if name not in _installed())]


def rule_class(name: str) -> type[Rule]:
    """Find the class of a rule by its name.

    Raises:
        InvalidInputError: there is none of that name; the message has the nearest one.
        RuleError: a package names it, and does not give it.
    """
    if name in _installed():
        return _loaded(_installed()[name])
    if name in _registered:
        return _registered[name]
    raise unknown(f"unknown rule {name!r}", name, rule_names())


def all_rules() -> tuple[Rule, ...]:
    """Give every rule that can be had, under its default options; a package's that is broken is left out."""
    found = []
    for name in rule_names():
        try:
            found.append(rule_class(name)())
        except RuleError as error:
            warnings.warn(str(error), stacklevel=2)
    return tuple(found)


def source_of(rule: Rule) -> str | None:
    """Name what brings a rule, for whoever lacks it: an installed package, or the module; None for softmeet's own."""
    if rule.name in _OWN:
        return None
    entry = _installed().get(rule.name)
    if entry is not None and entry.dist is not None:
        return f"package {entry.dist.name}"
    packages = packages_distributions().get(type(rule).__module__.partition(".")[0])
    return f"package {packages[0]}" if packages else f"class {type(rule).__qualname__}"


def require_own_name(rule: Rule) -> None:
    """Refuse an instance of a rule that cannot be named: another class has its name, or it has none.

    Raises:
        InvalidInputError: so it is.
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
    """Refuse what is no rule, or has no name, no summary, or options that cannot be told from settings.

    Raises:
        InvalidInputError: so it is.
    """
    if not (inspect.isclass(rule) and issubclass(rule, Rule)) or inspect.isabstract(rule):
        raise InvalidInputError(f"expected a subclass of softmeet.Rule with a method solve in {where}, got {rule!r}")
    name, summary = getattr(rule, "name", None), getattr(rule, "summary", None)
    if not (isinstance(name, str) and _NAME.fullmatch(name) and isinstance(summary, str) and summary):
        raise InvalidInputError(
            f"expected {rule.__name__} to have a name of small letters, digits and hyphens, and a summary, got "
            f"name = {name!r}, summary = {summary!r}"
        )
    if shared := sorted(_reserved() & rule.model_fields.keys()):
        raise InvalidInputError(f"the option {shared[0]!r} of the rule {name!r} is a setting of all: name it otherwise")
    if needy := [option for option, field in rule.model_fields.items() if field.is_required()]:
        raise InvalidInputError(f"expected a default for each option of the rule {name!r}, got none for {needy[0]}")


def _reserved() -> set[str]:
    from softmeet.rules.settings import SHORT, Settings

    return {*Settings.model_fields, *SHORT, "prompt_weights"}


def _origin(entry: EntryPoint) -> str:
    owner = "softmeet itself" if entry.name in _OWN else f"the entry point {entry.value}"
    return owner if entry.dist is None else f"the package {entry.dist.name}"


def _place(rule: type[Rule]) -> tuple[str, str]:
    """Say where a class is defined: a notebook's cell or a module that is run again may register it again."""
    return rule.__module__, rule.__qualname__
