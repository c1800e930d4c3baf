"""What commands and spellings that are gone are today, for a user who types one of them."""

from __future__ import annotations

# The beginning of the message that such words get, and what is said behind it.
_TODAY = {
    "no such command 'study'": "it is python benchmarks/study.py in a clone of softmeet",
    "got unexpected extra argument": "members are named by -m, and an option is repeated for each value, -m A -m B",
} | {
    f"no such option: --{option}": f"it is an option of a rule, --rule NAME:{option}=…"
    for option in ("metric", "slack", "vertex")
}


def today(message: str) -> str:
    """Return what a form that is gone is today, as the end of the message that it gets; empty if it was none.

    Args:
        message: what was wrong with the words of a command, as click says it, without a capital at its beginning.

    >>> today("no such command 'study'")
    ': it is python benchmarks/study.py in a clone of softmeet'
    """
    return next((f": {what}" for before, what in _TODAY.items() if message.startswith(before)), "")
