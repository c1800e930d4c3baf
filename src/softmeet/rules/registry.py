"""All rules, by name."""

from __future__ import annotations

from typing import Any, TypeVar

from softmeet.errors import InvalidInputError
from softmeet.rules.base import Rule
from softmeet.rules.named import Named
from softmeet.rules.values import SHORT, SettingValues

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
# Names of settings, which no option of a rule may have.
_RESERVED = {*SettingValues.model_fields, *SHORT, "prompt_weights"}

R = TypeVar("R", bound=type[Rule])


def _refuse_shared(rule: Any) -> None:
    if shared := sorted(_RESERVED & rule.model_fields.keys()):
        raise InvalidInputError(
            f"the option {shared[0]!r} of the rule {rule.name!r} is a setting of all: name it otherwise"
        )


RULES: Named[Rule] = Named("rule", Rule, "a method solve", _OWN, "softmeet.rules", _refuse_shared)


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
    RULES.register(rule, "register_rule")
    return rule


def rule_names() -> list[str]:
    """Return the names of all known rules, without importing any.

    softmeet's own come first, then those of installed packages, then those registered in this process.

    Example:
        >>> import softmeet
        >>> softmeet.rule_names()[:2]
        ['meet', 'max-entropy']
    """
    return RULES.names()


def rule_class(name: str) -> type[Rule]:
    """Return the class of the rule with the name ``name``, importing it if necessary.

    Raises:
        InvalidInputError: if there is no rule of that name; the message suggests the nearest name.
        RuleError: if the package that announces the rule fails to provide it.
    """
    return RULES.find(name)


def all_rules() -> tuple[Rule, ...]:
    """Return an instance of every known rule with its default options, in the order of :func:`rule_names`.

    A rule whose package fails to provide it is left out, with a warning.
    """
    return RULES.every()


def source_of(rule: Rule) -> str | None:
    """Return a rule's source: ``package NAME``, or ``class NAME`` if no package has it; None for softmeet's own rules.

    Saved ensembles keep it, for the error if the rule is unknown when they are loaded.
    """
    return RULES.source_of(rule)


def require_own_name(rule: Rule) -> None:
    """Check that a rule's name leads to the rule's own class, as configurations save rules by name.

    Raises:
        InvalidInputError: if another class has the name, or the rule's class is not usable.
        RuleError: if the name belongs to a package that fails to provide its rule.
    """
    RULES.require_own_name(rule, "rule=")
