"""Which rules to evaluate, and with which options: a name and the arguments of ``combine`` that it stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from softmeet.errors import InvalidInputError
from softmeet.rules.gates import checked_gate, parse_gate
from softmeet.rules.registry import find_rule
from softmeet.rules.validate import checked_number, checked_pool, checked_trust, checked_weights

BASELINES = ("logit-mean", "prob-mean")
# The same where the ensemble's own weights or temperature would make something else of those names.
UNIFORM = tuple(f"uniform {name}" for name in BASELINES)
_LISTS, _NUMBERS, _WORDS = ("trust", "weights"), ("temperature", "tol", "prompt_weights"), ("pool", "gate")
# A colon that parts options, not the one of gate=unsure:0.5.
_COLON = re.compile(r":(?![\d.])")


@dataclass(frozen=True)
class Choice:
    """A rule with options.

    ``settings`` are arguments of ``EnsembleForCausalLM.combine_rows``; ``prompt``, if positive, has the weights follow
    from the members' perplexity on so many first tokens of each document.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    prompt: int = 0


def parse_choices(text: str, n: int, bands: int = 1) -> list[Choice]:
    """Rules as the command line has them: ``logit-mean,meet:trust=0.3,meet:trust=1/0/0.3:pool=prob-mean``.

    Options follow a rule after colons, lists have slashes. Options are ``trust``, ``weights``, ``temperature``,
    ``pool``, ``tol``, ``gate`` and ``prompt_weights``.

    Args:
        text: the rules.
        n: the number of members.
        bands: of each member's head, which may have a trust each.

    Raises:
        InvalidInputError: a rule or an option is unknown or has a bad value.
    """
    found = [_parse(entry.strip(), n, bands) for entry in text.split(",") if entry.strip()]
    if not found:
        raise InvalidInputError("expected at least one rule, such as logit-mean,prob-mean,meet")
    return list({choice.name: choice for choice in found}.values())


def _parse(entry: str, n: int, bands: int) -> Choice:
    rule, *options = _COLON.split(entry)
    settings: dict[str, Any] = {"rule": find_rule(rule).name}
    for option in options:
        key, _, value = option.partition("=")
        settings[key] = _value(entry, key, value)
    prompt = settings.pop("prompt_weights", 0)
    if not float(prompt).is_integer() or ("prompt_weights=" in entry and prompt < 1):
        raise InvalidInputError(f"expected prompt_weights=TOKENS, an integer of at least 1, in {entry!r}")
    if "weights" in settings:
        settings["weights"] = checked_weights(settings["weights"], n, free=bool(settings.get("free_weights")))
    if "trust" in settings:
        given = settings["trust"]
        settings["trust"] = list(checked_trust(given[0] if len(given) == 1 else given, n, bands))
    checked_pool(settings.get("pool", "logit-mean"))
    parse_gate(settings.get("gate"))
    if "temperature" in settings:
        settings["rule_temperature"] = checked_number("temperature", settings.pop("temperature"), positive=True)
    return Choice(entry, settings, int(prompt))


def _value(entry: str, key: str, value: str) -> Any:
    if key in _WORDS:
        return value
    if key not in _LISTS + _NUMBERS:
        expected = ", ".join(_LISTS + _NUMBERS + _WORDS)
        raise InvalidInputError(f"unknown option {key!r} in {entry!r}: expected some of {expected}")
    try:
        numbers = [float(part) for part in value.split("/")]
    except ValueError:
        raise InvalidInputError(f"expected {key}=NUMBER or {key}=NUMBER/NUMBER in {entry!r}, got {value!r}") from None
    return numbers if key in _LISTS else numbers[0]


def with_baselines(choices: Sequence[Choice], weights: Sequence[float] = (), temperature: float = 1.0) -> list[Choice]:
    """``choices``, and before them the averages that they do not name.

    Args:
        choices: rules.
        weights, temperature: of the ensemble itself; unless they are uniform and 1, uniform averages are added, too.
    """
    named = {choice.name for choice in choices}
    missing = [Choice(name, {"rule": name}) for name in BASELINES if name not in named]
    even = [1 / len(weights)] * len(weights) if weights else []
    if list(weights) == even and temperature == 1:
        return [*missing, *choices]
    plain = {"weights": even, "rule_temperature": 1.0}
    uniform = [Choice(name, {**plain, "rule": rule}) for name, rule in zip(UNIFORM, BASELINES, strict=True)]
    return [*uniform, *missing, *choices]


def under_gates(choices: Sequence[Choice], gates: Sequence[str]) -> list[Choice]:
    """``choices``, each that has no gate of its own also under each of some gates.

    Raises:
        InvalidInputError: a gate is none.
    """
    plain = [choice for choice in choices if "gate" not in choice.settings]
    found = [*choices, *(_under(choice, gate) for gate in map(checked_gate, gates) if gate for choice in plain)]
    return list({choice.name: choice for choice in found}.values())


def _under(choice: Choice, gate: str) -> Choice:
    return replace(choice, name=f"{choice.name}:gate={gate}", settings=choice.settings | {"gate": gate})


def ungated(choice: Choice) -> dict[str, Any]:
    """The settings of a choice without its gate."""
    return {key: value for key, value in choice.settings.items() if key != "gate"}
