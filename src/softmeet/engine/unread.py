"""Heads that cannot be read: which rules and settings they rule out."""

from __future__ import annotations

from collections.abc import Sequence

from softmeet.errors import UnsupportedHeadError
from softmeet.members.opaque import Head, OpaqueHead
from softmeet.rules.registry import all_rules
from softmeet.rules.settings import Settings

# The default rule of ensembles without heads that can be read: over bytes, or of members whose heads cannot be read.
AVERAGE = "logit-mean"


def averages() -> str:
    """Return the names of all rules that are averages, joined by "or"."""
    return " or ".join(one.name for one in all_rules() if one.is_average)


def reader_of(settings: Settings) -> str | None:
    """Return what in the settings reads heads, such as ``"the rule meet"``; None if nothing does."""
    if settings.rule.reads_heads:
        return f"the rule {settings.rule.name}"
    return None


def require_read(settings: Settings, names: Sequence[str], heads: Sequence[Head]) -> None:
    """Check that the settings read no head that cannot be read.

    Args:
        settings: the settings.
        names: the members' names, for the message.
        heads: their heads, in the same order.

    Raises:
        UnsupportedHeadError: if the rule reads such a head.
    """
    reader = reader_of(settings)
    for name, head in zip(names, heads, strict=True):
        if reader is not None and isinstance(head, OpaqueHead):
            raise unreadable(reader, name, head.why, head.remedy)


def unreadable(reader: str, name: str, why: str, remedy: str) -> UnsupportedHeadError:
    """Return the error that says what reads a head, and why that cannot be read."""
    leave = "" if reader.startswith("the rule") else "leave it out, and "
    return UnsupportedHeadError(
        f"{reader} reads heads (output layers), and that of {name} {why}: {leave}choose {averages()}"
        + (f", or {remedy}" if remedy else "")
    )
