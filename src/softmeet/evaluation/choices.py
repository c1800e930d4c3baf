"""The rules that an evaluation compares, each with its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet.rules.registry import rule_class
from softmeet.rules.settings import Settings, parse_rule
from softmeet.rules.values import POOLS

# The averages that every evaluation adds to its rules; and their names with equal weights and temperature 1, which are
# added if the ensemble has weights or a temperature of its own.
BASELINES = POOLS
UNIFORM = tuple(f"uniform {name}" for name in BASELINES)
# How the names of what was fitted by folds begin.
FITTED = "fitted "
_PROMPT = ":prompt_weights="


@dataclass(frozen=True)
class RuleChoice:
    """A rule with settings, to be evaluated.

    Attributes:
        name: the name of its scores, usually the rule's text, such as ``meet:trust=0.3``.
        settings: changes to the ensemble's settings, ``rule`` (a text) among them, by name, as JSON allows them: the
            arguments of :meth:`Settings.changed`.
        prompt: if positive, a number of tokens: in each document the members' weights after the first ``prompt``
            targets are ∝ exp(-ℓ_i), ℓ_i being member i's mean loss on those in nats; 0 to keep the weights.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    prompt: int = 0


def parse_choices(rules: Sequence[str], n: int) -> list[RuleChoice]:
    """Read rules in the form of the command line, such as ``logit-mean`` or ``meet:trust=1/0/0.3:pool=prob-mean``.

    Options may be the rule's own, an ensemble's settings, or ``prompt_weights=TOKENS``, which becomes ``prompt``.

    Args:
        rules: a text for each rule; one that is repeated counts once.
        n: the number of members.

    Raises:
        InvalidInputError: if a rule or an option is unknown or has a bad value, or ``rules`` is empty.

    >>> parse_choices(["meet:trust=1/0.3"], n=2)
    [RuleChoice(name='meet:trust=1/0.3', settings={'rule': 'meet', 'trust': [1.0, 0.3]}, prompt=0)]
    """
    found = {entry: _parse(entry, n) for entry in map(str.strip, rules)}
    if not found:
        raise InvalidInputError("expected at least one rule, such as meet or logit-mean")
    return list(found.values())


def _parse(entry: str, n: int) -> RuleChoice:
    text, prompt = without_prompt(entry)
    rule, settings = parse_rule(text)
    complete = Settings(rule=rule, **settings).for_members(n).plain()
    return RuleChoice(entry, {"rule": str(rule)} | {key: complete[key] for key in settings}, prompt)


def loaded_by(rules: Sequence[str]) -> str | None:
    """Return the rule by which members are loaded that several are tried on: the first that reads heads, if one does.

    Args:
        rules: texts as of :func:`parse_choices`.

    Returns:
        the rule with its own options alone; the first one where none reads heads, None without a rule.

    >>> loaded_by(["logit-mean", "meet:trust=1"])
    'meet'
    """
    parsed = [parse_rule(without_prompt(rule.strip())[0])[0] for rule in rules]
    return next((str(rule) for rule in sorted(parsed, key=lambda rule: not rule.reads_heads)), None)


def without_prompt(entry: str) -> tuple[str, int]:
    """Split a rule's text into (the text without ``prompt_weights``; the number of tokens that it names, 0 without it).

    Raises:
        InvalidInputError: if the text after ``prompt_weights=`` is not a positive integer.

    >>> without_prompt("meet:prompt_weights=64:trust=1")
    ('meet:trust=1', 64)
    """
    before, marked, after = entry.partition(_PROMPT)
    tokens, colon, rest = after.partition(":")
    if marked and not (tokens.isdecimal() and int(tokens) > 0):
        raise InvalidInputError(f"expected prompt_weights=TOKENS, an integer of at least 1, in {entry!r}")
    return before + colon + rest, int(tokens or 0)


def with_baselines(
    choices: Sequence[RuleChoice], weights: Sequence[float] = (), temperature: float = 1.0
) -> list[RuleChoice]:
    """Return ``choices``, preceded by whichever of the averages ``logit-mean`` and ``prob-mean`` they do not name.

    Of an ensemble that has a weight below 0 an average that takes no such weights is left out.

    Args:
        choices: rules, as :func:`parse_choices` returns them.
        weights: the ensemble's own, one for each member, or none for equal ones.
        temperature: the ensemble's own. Unless it is 1 and weights are equal, averages with equal weights and
            temperature 1 come first of all, as ``uniform logit-mean`` and ``uniform prob-mean``.

    >>> [choice.name for choice in with_baselines(parse_choices(["meet", "prob-mean"], n=2))]
    ['logit-mean', 'meet', 'prob-mean']
    """
    named = {choice.name for choice in choices}
    signed = min(weights, default=0.0) < 0
    missing = [
        RuleChoice(name, {"rule": name})
        for name in BASELINES
        if name not in named and (rule_class(name).takes_signed_weights or not signed)
    ]
    even = [1 / len(weights)] * len(weights) if weights else []
    if list(weights) == even and temperature == 1:
        return [*missing, *choices]
    plain = {"weights": even, "rule_temperature": 1.0}
    uniform = [RuleChoice(name, {**plain, "rule": rule}) for name, rule in zip(UNIFORM, BASELINES, strict=True)]
    return [*uniform, *missing, *choices]


def under_gates(choices: Sequence[RuleChoice], gates: Sequence[str]) -> list[RuleChoice]:
    """Return ``choices``, followed by a copy under each gate of every choice that has no gate of its own.

    A copy's name is the choice's with ``:gate=GATE`` added; of equal names one choice is returned, the last.

    Args:
        choices: rules, as :func:`parse_choices` returns them.
        gates: texts of gates, such as ``unsure:0.5``; ``none`` adds nothing.

    Raises:
        InvalidInputError: if a text is not a gate.

    >>> [choice.name for choice in under_gates([RuleChoice("meet", {"rule": "meet"})], ["unsure:0.5"])]
    ['meet', 'meet:gate=unsure:0.5']
    """
    plain = [choice for choice in choices if "gate" not in choice.settings]
    named = [Settings(gate=gate).plain()["gate"] for gate in gates]
    gated = [
        RuleChoice(f"{choice.name}:gate={gate}", choice.settings | {"gate": gate}, choice.prompt)
        for gate in named if gate for choice in plain
    ]  # fmt: skip
    return list({choice.name: choice for choice in [*choices, *gated]}.values())
