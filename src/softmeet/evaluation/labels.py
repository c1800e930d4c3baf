"""One label for each row of an evaluation, the same in tables, plots and files."""

from __future__ import annotations

from collections.abc import Iterable

from softmeet.evaluation.choices import FITTED
from softmeet.members.member import numbered, short


def labels_of(members: Iterable[str], rules: Iterable[str]) -> dict[str, str]:
    """Return what to show for each row: the last two parts of a member's path, a rule's name.

    Args:
        members: the members' names.
        rules: those of rules; ``fitted MEMBER`` is shown with the member's label.

    Example:
        >>> labels_of(["/models/wide/gpt2"], ["prob-mean", "fitted /models/wide/gpt2"])
        {'/models/wide/gpt2': 'wide/gpt2', 'prob-mean': 'prob-mean', 'fitted /models/wide/gpt2': 'fitted wide/gpt2'}
    """
    names = list(members)
    found = dict(zip(names, numbered(list(map(short, names))), strict=True))
    return found | {
        rule: FITTED + found[member] if (member := rule.removeprefix(FITTED)) in found else rule for rule in rules
    }


def row_of(given: str, labels: dict[str, str]) -> str:
    """Return the name of the row that a name or a label means; what means none is returned unchanged."""
    return next((name for name, label in labels.items() if given in (name, label)), given)
