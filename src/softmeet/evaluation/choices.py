"""Which rules to evaluate, and with which options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet.rules.settings import POOLS, Settings, parse_rule

# The averages that every evaluation has beside its rules, and the same where the ensemble's own weights or temperature
# would make something else of those names.
BASELINES = POOLS
UNIFORM = tuple(f"uniform {name}" for name in BASELINES)
_PROMPT = ":prompt_weights="


@dataclass(frozen=True)
class RuleChoice:
    """A rule with options, to be evaluated.

    Attributes:
        name: what its scores are called.
        settings: changes to the ensemble's settings, as JSON has them.
        prompt: if positive, weights follow from the members' perplexity on so many first tokens of each document.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    prompt: int = 0


def parse_choices(rules: Sequence[str], n: int, bands: int = 1) -> list[RuleChoice]:
    """Read rules as the command line has them: ``logit-mean``, ``meet:trust=1/0/0.3:pool=prob-mean``.

    Beside the rule's own options and an ensemble's settings there is ``prompt_weights=TOKENS``.

    Args:
        rules: a text for each; the same one twice counts once.
        n: the number of members.
        bands: of each member's head, which may have a trust each.

    Raises:
        InvalidInputError: a rule or an option is unknown or has a bad value, or there is no rule.

    >>> parse_choices(["meet:trust=1/0.3"], n=2)
    [RuleChoice(name='meet:trust=1/0.3', settings={'rule': 'meet', 'trust': [1.0, 0.3]}, prompt=0)]
    """
    found = {entry: _parse(entry, n, bands) for entry in map(str.strip, rules)}
    if not found:
        raise InvalidInputError("expected at least one rule, such as meet or logit-mean")
    return list(found.values())


def _parse(entry: str, n: int, bands: int) -> RuleChoice:
    text, prompt = without_prompt(entry)
    rule, settings = parse_rule(text)
    complete = Settings(rule=rule, **{"bands": bands, **settings}).for_members(n).plain()
    return RuleChoice(entry, {"rule": str(rule)} | {key: complete[key] for key in settings}, prompt)


def without_prompt(entry: str) -> tuple[str, int]:
    """Split a choice into the rule's text and the tokens of ``prompt_weights``, 0 without it.

    Raises:
        InvalidInputError: what follows ``prompt_weights=`` is not a number of tokens.

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
    """Return ``choices``, and before them the averages that they do not name.

    Args:
        choices: rules.
        weights, temperature: of the ensemble itself; unless they are uniform and 1, uniform averages are added, too.

    >>> [choice.name for choice in with_baselines(parse_choices(["meet", "prob-mean"], n=2))]
    ['logit-mean', 'meet', 'prob-mean']
    """
    named = {choice.name for choice in choices}
    missing = [RuleChoice(name, {"rule": name}) for name in BASELINES if name not in named]
    even = [1 / len(weights)] * len(weights) if weights else []
    if list(weights) == even and temperature == 1:
        return [*missing, *choices]
    plain = {"weights": even, "rule_temperature": 1.0}
    uniform = [RuleChoice(name, {**plain, "rule": rule}) for name, rule in zip(UNIFORM, BASELINES, strict=True)]
    return [*uniform, *missing, *choices]


def under_gates(choices: Sequence[RuleChoice], gates: Sequence[str]) -> list[RuleChoice]:
    """Return ``choices``, and each that has no gate of its own also under each of some gates.

    Raises:
        InvalidInputError: a text is no gate.

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
