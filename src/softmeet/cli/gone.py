"""What older versions' commands and spellings are today, for a user who types one of them."""

from __future__ import annotations

# The beginning of the message that one of them gets, and what is said behind it.
_TODAY = {
    "no such command 'study'": "it is python benchmarks/study.py in a clone of softmeet",
}


def today(message: str) -> str:
    """Return what a form that is gone is today, as the end of the message that it gets; empty if it was none.

    Args:
        message: what was wrong with the words of a command, as click says it, without a capital at its beginning.

    >>> today("no such command 'study'")
    ': it is python benchmarks/study.py in a clone of softmeet'
    """
    return next((f": {what}" for before, what in _TODAY.items() if message.startswith(before)), "")
