"""Spellings of older versions, which are accepted with a warning and end with version 0.3.0.

====================================  =====================================
before                                today
====================================  =====================================
``--members A B``, ``-t A B``         ``-m A -m B``, ``-t A -t B``
``--rules logit-mean,meet:trust=1``   ``--rule logit-mean --rule meet:trust=1``
``--rule least-squares --metric raw``  ``--rule least-squares:metric=raw``
``--device cuda:0,cuda:1``            ``--device cuda:0 --device cuda:1``
====================================  =====================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softmeet.errors import InvalidInputError

# Options that may be repeated, also by their old names, and their names today.
_LISTS = {"--members": "--member", "--rules": "--rule"} | {name: name for name in ("--member", "-m", "--text", "-t")}
# Options of a single rule that had flags of their own in older versions.
_OF_RULES = ("metric", "slack", "vertex")


def warn(before: str, today: str) -> None:
    """Print a warning on stderr that a spelling is an old form.

    Args:
        before: the old spelling.
        today: advice on today's spelling, such as ``say -m A -m B``.
    """
    from softmeet.cli.messages import say

    say(f"{before} is an old form and ends with 0.3.0: {today}")


def modern_words(words: Sequence[str], *, several: bool = True) -> list[str]:
    """Translate a command's words from older spellings to today's; each translation is warned of on stderr.

    Args:
        words: the words after the command's name.
        several: whether options such as ``-m`` and ``--text`` may be followed by several values; if False, only the
            first word after one is its value, and the next words are arguments (``--members`` always takes several).

    Returns:
        the words in today's spelling.

    Raises:
        InvalidInputError: if an option of a single rule (``--metric``, ``--slack``, ``--vertex``) is among the words,
            but no ``--rule``, into whose first value it would move.
    """
    found: list[str] = []
    own: dict[str, str] = {}
    option, count, rest = "", 0, iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if (key := name.removeprefix("--")) in _OF_RULES:
            own[key] = "true" if key == "vertex" else value if equals else next(rest, "")
        elif word.startswith("-") and word != "-":
            option, count = name if name in _LISTS else "", 0
            found += [] if option else [word]
            if option and equals:
                found, count = found + _repeated(option, value, 0), 1
        else:
            mine = option and (several or not count or option == "--members")
            found += _repeated(option, word, count) if mine else [word]
            count += 1
    return _with_own_options(found, own) if own else found


def _repeated(option: str, value: str, count: int) -> list[str]:
    """Return one value of an option as words of today, with the option's name before it, and warn of an old form.

    Args:
        option: the option as it was spelled.
        value: the value; for ``--rules`` a list with commas, each part of which becomes a value.
        count: how many values of this option came directly before.
    """
    today = _LISTS[option]
    if today != option or count:
        warn(f"{option} with several values" if count else option, f"repeat {today}: {today} A {today} B")
    return [word for part in (split(value) if option == "--rules" else [value]) for word in (today, part)]


def _with_own_options(words: list[str], own: Mapping[str, str]) -> list[str]:
    """Return words with options of a single rule moved into the text of ``--rule``, as ``NAME:option=value``."""
    first = next(iter(own))
    if "--rule" not in words[:-1]:
        raise InvalidInputError(f"--{first} belongs to a rule: say --rule NAME:{first}={own[first]}")
    k = words.index("--rule") + 1
    text = ":".join([words[k], *(f"{key}={value}" for key, value in own.items())])
    warn(", ".join(f"--{key}" for key in own), f"say --rule {text}")
    return [*words[:k], text, *words[k + 1 :]]


def modern_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a configuration file from older spellings to today's, with a warning for each.

    ``members`` becomes ``member``, and ``rules`` becomes ``rule``, with a list. An option of a single rule (``metric``,
    ``slack``, ``vertex``) moves into the value of ``rule``: ``NAME:metric=raw``.

    Args:
        values: the file's values by name, with underscores.

    Returns:
        the values by today's names.

    Raises:
        InvalidInputError: if there is an option of a single rule, and ``rule`` is missing or a list.
    """
    found = dict(values)
    if "members" in found:
        warn("members: in a configuration file", "say member:")
        found["member"] = found.pop("members")
    if "rules" in found:
        warn("rules: in a configuration file", "say rule:, with a list")
        rules = found.pop("rules")
        found["rule"] = split(rules) if isinstance(rules, str) else rules
    own = {key: found.pop(key) for key in _OF_RULES if key in found}
    own = {key: str(value).lower() if isinstance(value, bool) else value for key, value in own.items() if value}
    if own:
        if not isinstance(found.get("rule"), str):
            raise InvalidInputError(f"{next(iter(own))} belongs to a rule: say rule: NAME:{next(iter(own))}=…")
        found["rule"] = ":".join([found["rule"], *(f"{key}={value}" for key, value in own.items())])
        warn(f"{', '.join(own)} in a configuration file", f"say rule: {found['rule']}")
    return found


def split(text: str) -> list[str]:
    """Return the parts of a text between commas, stripped of blanks, without empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def repeated(option: str, values: Sequence[str] | None) -> list[str] | None:
    """Split the values of a repeatable option at commas, with a warning, since commas are an old form.

    Args:
        option: the option's name, for the warning.
        values: its values; None if it was not given, which is returned unchanged.
    """
    if values is None or not any("," in value for value in values):
        return None if values is None else list(values)
    warn(f"{option} with commas", f"repeat it: {option} A {option} B")
    return [part for value in values for part in split(value)]
